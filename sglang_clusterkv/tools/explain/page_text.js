// The two texts, prompt and answer, as tokens that can be chosen; elements that hold somebody's text get it as text.

/** An element with attributes, and children that are elements or text. */
function made(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US", {maximumFractionDigits: 2});
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const textOf = (begin, end) => facts.pieces.slice(begin, end).join("");
/** A token's text as one line that shows white space; of a character's tokens only the last has a text. */
const shown = (token) => facts.pieces[token].replace(/\n/g, "⏎").trim() || (facts.pieces[token] ? "␣" : "part of a character");

const spans = [];
const passageSpans = [];
const passageOf = new Uint32Array(tokens);

function writeTexts() {
  const begins = [...facts.passages, tokens];
  const parts = {prompt: document.createDocumentFragment(), answer: document.createDocumentFragment()};
  for (let passage = 0; passage + 1 < begins.length; passage++) {
    const element = made("span", {class: "passage", role: "presentation"});
    for (let token = begins[passage]; token < begins[passage + 1]; token++) {
      const span = document.createElement("span");
      span.className = "token";
      span.id = `token-${token}`;
      span.setAttribute("role", "option");
      span.textContent = facts.pieces[token];
      spans.push(span);
      passageOf[token] = passage;
      element.append(span);
    }
    passageSpans.push(element);
    (begins[passage] < promptTokens ? parts.prompt : parts.answer).append(element);
  }
  byId("prompt").append(parts.prompt);
  byId("answer").append(parts.answer);
}

const setClass = (chosen, name) => spans.forEach((span, token) => span.classList.toggle(name, chosen(token)));

/** Shade each token by its value, linear or as a root, the largest darkest. */
function shade(values, rooted) {
  let largest = 0;
  for (const value of values) largest = Math.max(largest, value);
  for (let token = 0; token < tokens; token++) {
    const share = largest ? values[token] / largest : 0;
    spans[token].style.setProperty("--shade", (0.9 * (rooted ? Math.sqrt(share) : share)).toFixed(3));
  }
  return largest;
}

/** Scroll an element of a text into sight: within the text where that scrolls by itself, so that all around it stays. */
function bring(element) {
  const text = element.closest(".text"), down = element.getBoundingClientRect().top - text.getBoundingClientRect().top;
  const inside = text.scrollHeight > text.clientHeight;
  if (inside) text.scrollTop += down - text.clientHeight / 4;
  element.scrollIntoView({block: inside ? "nearest" : "center"});
}

/** Scroll to a passage and mark it. */
function showPassage(passage) {
  passageSpans.forEach((element) => element.classList.remove("here"));
  passageSpans[passage].classList.add("here");
  bring(passageSpans[passage]);
}

/**
 * A list of tokens [first, end) of which one may be chosen: by click, with the arrow keys, Home and End; Escape chooses none.
 * `choose` gets the token, or null. `stepOf` says how far up and down go.
 */
function tokenList(element, first, end, choose, stepOf) {
  let active = null;
  if (first === end) return () => null;
  const activate = (token) => {
    if (active !== null) {
      spans[active].classList.remove("active");
      spans[active].removeAttribute("aria-selected");
    }
    active = token;
    element.removeAttribute("aria-activedescendant");
    if (token !== null) {
      spans[token].classList.add("active");
      spans[token].setAttribute("aria-selected", "true");
      element.setAttribute("aria-activedescendant", spans[token].id);
    }
    return choose(token);
  };
  element.addEventListener("click", (event) => {
    const span = event.target.closest(".token");
    if (span) activate(Number(span.id.slice("token-".length)));
  });
  element.addEventListener("keydown", (event) => {
    const from = active ?? first - 1;
    const to = {
      ArrowRight: from + 1, ArrowLeft: active === null ? end - 1 : from - 1, Home: first, End: end - 1,
      ArrowDown: stepOf(active, 1), ArrowUp: stepOf(active, -1),
    }[event.key];
    if (event.key === "Escape") activate(null);
    else if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    else {
      const token = Math.min(Math.max(to, first), end - 1);
      activate(token);
      spans[token].scrollIntoView({block: "nearest"});
    }
    event.preventDefault();
  });
  return activate;
}
