// What is shown, and how it follows from what is chosen.

const begins = [...facts.passages, tokens], wordBegins = [...facts.words, tokens];
const state = {answer: null, prompt: null};
const stepBefore = new Map(); // answer token -> the step that predicted it
const sparseOf = new Map(); // step -> its number among the sparse ones
facts.steps.forEach((step) => {
  stepBefore.set(step.token + 1, step);
  if (step.dense === null) sparseOf.set(step, sparseOf.size);
});
const inRanges = (ranges) => (token) => ranges.some(([begin, end]) => begin <= token && token < end);

function currentView() {
  const layer = byId("layers").value, head = Number(byId("heads").value);
  const members = layer === "all" ? layers.map((_, index) => index)
    : layer[0] === "g" ? facts.groups[Number(layer.slice(1))].members : [Number(layer)];
  return {members, head};
}

/** The answer's tokens that are looked at: the chosen one, or all of its word; none for the whole answer. */
function chosenTokens() {
  if (state.answer === null) return [];
  if (!byId("word").checked) return [state.answer];
  const word = wordBegins.findLastIndex((begin) => begin <= state.answer);
  return [...Array(wordBegins[word + 1] - wordBegins[word]).keys()].map((at) => wordBegins[word] + at);
}

/** Tokens before this one, of those that a step could recall, are not in a window of as many tokens as it recalled. */
function windowBegin(step) {
  const always = inRanges(step.base);
  let left = Math.min(facts.server.clusterkv.budget_tokens, step.clustered), token = step.token + 1;
  while (left > 0 && token > 0) if (!always(--token)) left--;
  return token;
}

/** Of all the times that the view's layers and heads recalled, the share in which each token was among them. */
async function recalledOf(view) {
  const times = Math.max(1, sparseSteps * view.members.length * headsOf(view).length);
  return (await countsOf(view)).map((count) => count / times);
}

let drawing = 0;

/** Draw everything that follows from the view and the chosen answer token. */
async function draw() {
  const mine = ++drawing, view = currentView(), looked = chosenTokens(), chosen = looked.length > 0;
  const steps = looked.map((token) => stepBefore.get(token)).filter((step) => step);
  const recalling = steps.filter((step) => sparseOf.has(step)), sparse = recalling.map((step) => sparseOf.get(step));
  const mass = await meanMassOf(view, sparse);
  const above = sparse.length > 0 && byId("above").checked;
  const mean = above || !chosen ? await usualMassOf(view) : null;
  const weighed = chosen || !byId("counted").checked;
  const values = !weighed ? await recalledOf(view) : !chosen ? mean
    : above ? mass.map((value, at) => Math.max(0, value - mean[at])) : mass;
  const shares = sparse.length ? await sharesOf(view, sparse) : null;
  const all = chosen ? sparse : [...Array(sparseSteps).keys()];
  const quest = facts.quest && byId("quest").checked && all.length ? await questOf(view, all) : null;
  if (mine !== drawing) return; // another choice was made meanwhile
  const largest = shade(values, weighed);
  const traced = facts.steps.filter((one) => one.dense === null);
  const always = (steps.length ? steps : traced).map((one) => inRanges(one.base));
  setClass((token) => always.length > 0 && always.every((has) => has(token)), "base");
  drawWindow(steps.length ? recalling : traced);
  drawQuest(quest);
  drawLegend(looked, weighed, above, largest);
  drawChosen(looked, steps, recalling, shares, mass);
  drawPassages(values, weighed, chosen && !sparse.length);
  drawPointer();
  document.body.dataset.drawn = String(mine);
}

function drawWindow(steps) {
  const border = byId("window").checked && steps.length ? Math.min(...steps.map(windowBegin)) : 0;
  const sinks = inRanges(steps.flatMap((one) => one.base));
  setClass((token) => token < border && !sinks(token), "beyond");
}

function drawQuest(quest) {
  setClass((token) => quest !== null && quest.beside[token] > quest.inside[token], "unread");
  const total = (values) => values.reduce((sum, value) => sum + value, 0);
  const missed = quest && total(quest.beside), all = quest && missed + total(quest.inside);
  byId("quest-summary").textContent = quest === null ? ""
    : `Quest, with pages of ${facts.server.page_size} tokens and the same budget, would have missed ` +
      `${percent(missed / Math.max(1e-12, all))} of the mass that was recalled here. Struck: tokens of which it misses more than half.`;
}

function drawLegend(looked, weighed, above, largest) {
  const key = (style, text) => made("span", {class: `key ${style}`}, text);
  const dark = key("token", percent(largest));
  dark.style.setProperty("--shade", 0.9);
  const meaning = !weighed ? "how often a token was recalled, of all steps, layers and heads"
    : !looked.length ? "share of the attention mass, mean over the answer's sparse steps (root scale)"
    : `share of the attention mass${looked.length > 1 ? ", mean over the word's steps" : ""}` +
      `${above ? ", beyond the answer's mean" : ""} (root scale)`;
  const parts = [`Darkness: ${meaning}; the darkest `, dark, ". ", key("token base", "Dotted"),
    looked.length === 1 ? ": sinks, window and gaps, read by this step in any case. "
      : looked.length ? ": read by each of its steps in any case. " : ": read by every sparse step in any case. "];
  if (byId("window").checked) parts.push(key("token beyond", "Wavy"), ": older than a window of the same size. ");
  byId("legend").replaceChildren(...parts);
}

function drawChosen(looked, steps, recalling, shares, mass) {
  const title = byId("chosen-title"), box = byId("shares"), paragraph = (text) => made("p", {}, text);
  if (!looked.length) {
    title.textContent = "The whole answer";
    box.replaceChildren(paragraph(`Over ${number(sparseSteps)} sparse steps.`));
    return;
  }
  const [first, last] = [looked[0], looked.at(-1)], place = (token) => token - promptTokens + 1;
  title.textContent = looked.length === 1 ? `Token ${place(first)}: “${shown(first)}”`
    : `Tokens ${place(first)} to ${place(last)}: “${textOf(first, last + 1).trim()}”`;
  if (!steps.length) {
    box.replaceChildren(paragraph(first === promptTokens ? "The prefill predicted it. Prefill is dense: all of the prompt was read."
      : "Its step is not in the trace: the oldest were dropped."));
    return;
  }
  const sum = (name) => steps.reduce((total, step) => total + step[name], 0);
  const bytes = `Bytes read: ${number(sum("bytes_read"))} of ${number(sum("bytes_dense"))} that ` +
    `${steps.length === 1 ? "a dense step reads" : "dense steps read"} (${percent(sum("bytes_read") / sum("bytes_dense"))}).`;
  if (!recalling.length) {
    const reasons = [...new Set(steps.map((step) => step.dense))].join(", ");
    box.replaceChildren(paragraph(`${steps.length === 1 ? "A dense step" : "Dense steps"} (${reasons}): everything was read.`), paragraph(bytes));
    return;
  }
  const left = facts.server.clusterkv.estimate === false ? "left out" : "estimated";
  const names = ["always read", "recalled", left], styles = ["basis", "exact", "estimated"];
  const bar = made("div", {class: "bar", role: "img", "aria-label": names.map((n, i) => `${n} ${percent(shares[i])}`).join(", ")});
  const list = made("p", {class: "quiet"});
  names.forEach((name, part) => {
    const piece = made("span", {class: styles[part]});
    piece.style.width = `${100 * shares[part]}%`;
    bar.append(piece);
    list.append(made("span", {class: `swatch ${styles[part]}`}), `${name} ${percent(shares[part])}  `);
  });
  const border = Math.min(...recalling.map(windowBegin));
  let older = 0, all = 0;
  mass.forEach((value, at) => { all += value; if (at < border) older += value; });
  const missed = all ? shares[1] * older / all : 0;
  if (recalling.length < looked.length)
    list.append(`(of ${recalling.length} of the ${looked.length} tokens: the others were predicted densely, or are not in the trace)`);
  box.replaceChildren(bar, list, paragraph(`Read exactly: ${percent(shares[0] + shares[1])} of the mass. ` +
    `A window of the same size would have missed ${percent(missed)} of the mass: it was recalled from before its border.`), paragraph(bytes));
}

function drawPassages(values, weighed, nothing) {
  const sums = new Float64Array(passageSpans.length);
  // Mass adds up, how often does not: there, it is the mean over a passage's tokens.
  values.forEach((value, token) => { sums[passageOf[token]] += weighed ? value : value / (begins[passageOf[token] + 1] - begins[passageOf[token]]); });
  const order = [...sums.keys()].filter((passage) => sums[passage] > 0).sort((a, b) => sums[b] - sums[a]).slice(0, 10);
  byId("passages-title").textContent = weighed ? "Passages with most attention mass" : "Passages that were recalled most";
  byId("passages").replaceChildren(...order.map((passage) => {
    const begin = facts.passages[passage], end = facts.passages[passage + 1] ?? tokens;
    const button = made("button", {type: "button", "data-passage": passage}, made("strong", {}, percent(sums[passage])), ` ${textOf(begin, end).trim()}`);
    button.addEventListener("click", () => showPassage(passage));
    return made("li", {}, button);
  }));
  if (nothing) byId("passages-title").textContent = "Nothing was recalled";
}

const HIGH = 50, BYTES = 26, GAP = 6;
const answerTokens = tokens - promptTokens;
/** Of the strip, in pixels: as wide as the page allows, within limits. */
const COLUMN = Math.min(24, Math.max(7, Math.floor(byId("strip").clientWidth / Math.max(1, answerTokens))));

function svg(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** The strip along the answer: a column for each of its tokens. */
async function drawStrip() {
  const kl = facts.compare?.kl ?? null;
  const rows = [["mass read exactly", HIGH], ["bytes read", BYTES], ...(kl ? [["KL to the other server", BYTES]] : [])];
  const height = rows.reduce((sum, [, high]) => sum + high + GAP + 14, 0);
  const picture = svg("svg", {width: Math.max(answerTokens * COLUMN, 200), height, role: "img"});
  const largestKl = Math.max(1e-9, ...(kl ?? []).filter((value) => value !== null));
  const everything = {members: layers.map((_, index) => index), head: -1};
  const tops = [];
  rows.reduce((y, [name, high]) => {
    picture.append(svg("text", {x: 0, y: y + 11}, name));
    tops.push(y + 14);
    return y + 14 + high + GAP;
  }, 0);
  let exact = 0, read = 0, dense = 0;
  const reasons = new Map();
  for (let at = 0; at < answerTokens; at++) {
    const step = stepBefore.get(promptTokens + at), column = svg("g", {"data-token": promptTokens + at});
    const bar = (row, style, from, to) => column.append(svg("rect", {class: style, x: at * COLUMN, width: COLUMN - 1,
      y: tops[row] + rows[row][1] * (1 - to), height: Math.max(0, rows[row][1] * (to - from))}));
    let words = "not traced";
    rows.forEach((_, row) => bar(row, "track", 0, 1));
    if (at === 0 && !step) { words = "prefill: dense"; bar(0, "all-read", 0, 1); }
    if (step) {
      const share = step.bytes_read / step.bytes_dense;
      read += step.bytes_read;
      dense += step.bytes_dense;
      bar(1, "bytes", 0, Math.min(1, share));
      if (step.dense === null) {
        const shares = await sharesOf(everything, [sparseOf.get(step)]);
        exact += shares[0] + shares[1];
        bar(0, "basis", 0, shares[0]);
        bar(0, "exact", shares[0], shares[0] + shares[1]);
        words = `${percent(shares[0] + shares[1])} of the mass read exactly`;
      } else {
        bar(0, "all-read", 0, 1);
        reasons.set(step.dense, (reasons.get(step.dense) ?? 0) + 1);
        words = `dense: ${step.dense}`;
      }
      words += `, ${percent(share)} of dense's bytes`;
    }
    if (kl && kl[at] !== null && kl[at] !== undefined) {
      bar(2, "kl", 0, Math.sqrt(Math.max(0, kl[at]) / largestKl));
      words += `, KL ${kl[at].toPrecision(2)}`;
    }
    column.append(svg("title", {}, `“${shown(promptTokens + at)}”: ${words}`));
    picture.append(column);
    if (facts.compare?.first_difference === at)
      picture.append(svg("line", {class: "parting", x1: at * COLUMN - 1, x2: at * COLUMN - 1, y1: 0, y2: height}));
  }
  picture.append(svg("rect", {class: "pointer", id: "pointer", y: 1, height: height - 2, width: COLUMN + 1, x: -20}));
  picture.addEventListener("click", (event) => {
    const column = event.target.closest("[data-token]");
    if (column) chooseAnswer(Number(column.dataset.token));
  });
  const why = [...reasons].map(([reason, count]) => `${count} for “${reason}”`).join(", ");
  const summary = (sparseSteps ? `Mean mass read exactly: ${percent(exact / sparseSteps)} over ${number(sparseSteps)} sparse steps. `
    : "No step was sparse. ") + (why ? `Dense steps: ${why}. ` : "") +
    (dense ? `Bytes read: ${percent(read / dense)} of dense's. ` : "") +
    (facts.request.dropped_steps ? `${number(facts.request.dropped_steps)} steps are not in the trace: the oldest were dropped.` : "");
  picture.setAttribute("aria-label", summary);
  byId("strip").replaceChildren(picture);
  const colours = [["basis", "always read"], ["exact", "recalled"], ["track", "not read exactly"], ["all-read", "dense"]];
  byId("strip-legend").replaceChildren(...colours.flatMap(([style, name]) => [made("span", {class: `swatch ${style}`}), `${name}  `]));
  byId("strip-summary").textContent = summary;
}

function drawPointer() {
  byId("pointer")?.setAttribute("x", state.answer === null ? -20 : (state.answer - promptTokens) * COLUMN - 1);
}

let clustering = 0;

/** The chosen prompt token's cluster: its members in their context. */
async function drawCluster() {
  const mine = ++clustering, token = state.prompt;
  const index = Number(byId("cluster-layer").value), head = Number(byId("cluster-head").value);
  const found = token === null || !layers.length ? null : await layerClusters(index);
  if (mine !== clustering) return;
  const clusters = found?.of(head), cluster = found ? clusters[token] : -1;
  setClass((at) => cluster >= 0 && at < promptTokens && clusters[at] === cluster, "member");
  byId("members").replaceChildren();
  if (token === null) {
    byId("cluster-title").textContent = "Cluster of a token";
    byId("cluster-summary").textContent = "Choose a token of the prompt to see what it is clustered with.";
    return;
  }
  byId("cluster-title").textContent = `Cluster of “${shown(token)}”, token ${number(token + 1)} of the prompt`;
  if (cluster < 0) {
    byId("cluster-summary").textContent = "It is in no cluster: sinks, gaps and the window are always read.";
    return;
  }
  const members = [...clusters.keys()].filter((at) => clusters[at] === cluster), spreads = found.spreads[head];
  const sorted = spreads.filter(Number.isFinite).sort((a, b) => a - b), middle = sorted[sorted.length >> 1];
  byId("cluster-summary").textContent = `Cluster ${cluster} of this head has ${members.length} ` +
    `token${members.length === 1 ? "" : "s"}, spread ${number(spreads[cluster] ?? NaN)} (median of the head's: ${number(middle ?? NaN)}).`;
  byId("members").append(...members.map((at) => {
    const button = made("button", {type: "button"}, `…${textOf(Math.max(0, at - 6), at)}`,
      made("b", {}, facts.pieces[at]), `${textOf(at + 1, Math.min(promptTokens, at + 7))}…`);
    button.addEventListener("click", () => showPassage(passageOf[at]));
    return made("li", {}, button);
  }));
}

function drawCompare() {
  const compare = facts.compare;
  if (!compare) return;
  byId("compare").hidden = false;
  const at = compare.first_difference, mine = facts.pieces.slice(promptTokens);
  const kl = at === null ? null : compare.kl?.[at];
  byId("compare-summary").textContent = at === null ? "Both answers are the same, token by token."
    : `They part at token ${at + 1}${kl === null || kl === undefined ? "" : `, where the KL is ${kl.toPrecision(2)}`}.`;
  const text = (title, pieces) => made("div", {}, made("h3", {}, title), made("div", {class: "text"},
    pieces.slice(0, at ?? undefined).join(""), ...(at === null ? [] : [made("mark", {}, pieces.slice(at).join(""))])));
  byId("compare-texts").append(text(`clusterkv: ${facts.server.model}`, mine), text(compare.model, compare.pieces));
}

function fillControls() {
  const option = (value, text) => made("option", {value}, text);
  const single = layers.map((layer, index) => option(String(index), `layer ${layer}`));
  const groups = facts.groups.length > 1 ? facts.groups.map((group, at) => option(`g${at}`, `layers ${group.label}`)) : [];
  byId("layers").append(option("all", "all that recall"), ...groups, ...single);
  const head = () => [...Array(heads).keys()].map((at) => option(String(at), `head ${at}`));
  byId("heads").append(option("-1", "all"), ...head());
  byId("cluster-layer").append(...single.map((one) => one.cloneNode(true)));
  byId("cluster-head").append(...head());
  const follow = () => {
    const view = currentView();
    if (view.members.length === 1) byId("cluster-layer").value = String(view.members[0]);
    if (view.head >= 0) byId("cluster-head").value = String(view.head);
    draw();
    drawCluster();
  };
  for (const id of ["layers", "heads"]) byId(id).addEventListener("change", follow);
  for (const id of ["cluster-layer", "cluster-head"]) byId(id).addEventListener("change", drawCluster);
  byId("quest").parentElement.hidden = !facts.quest;
  for (const id of ["window", "counted", "above", "word", "quest"]) byId(id).addEventListener("change", draw);
}

function writeAbout() {
  const {server, request} = facts;
  byId("about").textContent = `${server.model}; ${number(request.prompt_tokens)} tokens of prompt (${number(request.cached_tokens)} ` +
    `cached), ${number(request.answer_tokens)} of answer; budget ${number(server.clusterkv.budget_tokens)} tokens per step, layer ` +
    `and kv head; ${layers.length} of ${server.layers} layers recall, ${heads} kv heads; SGLang ${server.sglang}, ` +
    `sglang-clusterkv ${server.sglang_clusterkv}.`;
}

/** The first token of the passage so many passages on. */
const byPassage = (active, by) => begins[Math.max(0, active === null ? 0 : passageOf[active] + by)];
const byTen = (active, by) => (active ?? promptTokens) + 10 * by;

writeTexts();
fillControls();
writeAbout();
const chooseAnswer = tokenList(byId("answer"), promptTokens, tokens, (token) => {
  state.answer = token;
  return draw();
}, byTen);
tokenList(byId("prompt"), 0, promptTokens, (token) => {
  state.prompt = token;
  return drawCluster();
}, byPassage);
facts.steps.filter((step) => step.dense !== null).forEach((step) => spans[step.token + 1]?.classList.add("dense"));
drawCompare();
draw().then(drawStrip).then(() => {
  drawPointer();
  document.body.dataset.ready = "true";
});
