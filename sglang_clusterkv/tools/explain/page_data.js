"use strict";
// The trace as it lies in the page: unpacked where it is asked for. The formats are in packed.py and page.py.

/** What was shown or chosen in JSON by page.py. */
const facts = JSON.parse(document.getElementById("facts").textContent);
const promptTokens = facts.request.prompt_tokens;
const tokens = facts.pieces.length;
const heads = facts.server.kv_heads;
const layers = facts.server.recalling_layers;
const sparseSteps = facts.sparse_steps;

/** Lines of an element, each base64 of deflated bytes. */
async function unpacked(id) {
  const element = document.getElementById(id);
  if (!element) return [];
  const lines = element.textContent.trim().split("\n");
  return Promise.all(lines.map(async (line) => {
    const binary = atob(line), bytes = new Uint8Array(binary.length);
    for (let at = 0; at < binary.length; at++) bytes[at] = binary.charCodeAt(at);
    const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(inflated).arrayBuffer());
  }));
}

/** Whole numbers from planes of bytes. */
function fromPlanes(bytes, width) {
  const count = bytes.length / width, numbers = new Uint32Array(count);
  for (let plane = 0; plane < width; plane++)
    for (let at = 0; at < count; at++) numbers[at] |= bytes[plane * count + at] << (8 * plane);
  return numbers;
}

function half(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

/** The shares of mass that the 256 codes stand for. */
const sharesByCode = (perOctave) => Float64Array.from({length: 256}, (_, code) => (code ? 2 ** ((code - 255) / perOctave) : 0));
const levelShares = sharesByCode(8), mapShares = sharesByCode(4);

/** A reader of whole numbers of seven bits a byte, the lowest first. */
function varints(bytes) {
  let at = 0;
  return () => {
    let value = 0, factor = 1, byte;
    do { byte = bytes[at++]; value += (byte & 127) * factor; factor *= 128; } while (byte > 127);
    return value;
  };
}

/** The sets of pages that Quest would have read in a layer, by step and head. */
function pageSets([bytes]) {
  const next = varints(bytes);
  return Array.from({length: sparseSteps * heads}, () => {
    let page = -1;
    return Array.from({length: next()}, () => (page += 1 + next()));
  });
}

/** The sets of a layer: positions, where each step's and head's begin, and each member's mean mass. */
function setsOf([gone, came, levels]) {
  const sets = sparseSteps * heads, begins = new Uint32Array(sets + 1), last = Array(heads).fill([]);
  let positions = new Uint32Array(sets * 64), size = 0, goneAt = 0;
  const varint = varints(came);
  for (let set = 0; set < sets; set++) {
    const before = last[set % heads], begin = size;
    let left = varint(), next = left ? varint() : Infinity;
    const room = size + before.length + left;
    if (room > positions.length) {
      const larger = new Uint32Array(2 * room);
      larger.set(positions.subarray(0, size));
      positions = larger;
    }
    const take = () => {
      positions[size++] = next;
      next = --left > 0 ? next + 1 + varint() : Infinity;
    };
    for (let at = 0; at < before.length; at++) {
      if ((gone[goneAt + (at >> 3)] >> (at & 7)) & 1) continue;
      while (next < before[at]) take();
      positions[size++] = before[at];
    }
    while (left > 0) take();
    goneAt += (before.length + 7) >> 3;
    last[set % heads] = positions.subarray(begin, size);
    begins[set + 1] = size;
  }
  const masses = new Float32Array(size);
  for (let set = 0; set < sets; set++)
    for (let at = begins[set]; at < begins[set + 1]; at++) {
      const level = (levels[4 * sets + (at >> 2)] >> (2 * (at & 3))) & 3;
      masses[at] = levelShares[levels[4 * set + level]];
    }
  return {positions, begins, masses};
}

const kept = new Map();

/** What `make` gives, made once for each id. */
function once(id, make) {
  if (!kept.has(id)) kept.set(id, unpacked(id).then(make));
  return kept.get(id);
}

const questSets = (index) => once(`quest-${index}`, pageSets);
const layerSets = (index) => once(`recalled-${index}`, setsOf);
const allCounts = () => once("counts", ([bytes]) => (bytes ? fromPlanes(bytes, 4) : new Uint32Array(0)));
const allMass = () => once("mass", ([bytes]) => fromPlanes(bytes, 2));
const massMap = () => once("map", ([bytes]) => bytes);

const layerClusters = (index) => once(`clusters-${index}`, ([numbers, spreads]) => {
  const halves = fromPlanes(spreads, 2), ofHead = [];
  for (let at = 0; at < halves.length;) {
    const count = halves[at] + 65536 * halves[at + 1];
    ofHead.push(Array.from(halves.subarray(at + 2, at + 2 + count), half));
    at += 2 + count;
  }
  const clusters = Int32Array.from(fromPlanes(numbers, 4), (number) => number - 1);
  return {of: (head) => clusters.subarray(head * promptTokens, (head + 1) * promptTokens), spreads: ofHead};
});

/** A view is {members: indices into `layers`, head: a number, or -1 for all}. */
const isAll = (view) => view.head < 0 && view.members.length === layers.length;
const headsOf = (view) => (view.head < 0 ? [...Array(heads).keys()] : [view.head]);

/** How often each token was recalled, over the sparse steps and the view's layers and heads. */
async function countsOf(view) {
  const counts = new Float64Array(tokens);
  if (view.head < 0) {
    const all = await allCounts();
    for (const index of view.members)
      for (let at = 0; at < tokens; at++) counts[at] += all[index * tokens + at];
    return counts;
  }
  for (const index of view.members) {
    const {positions, begins} = await layerSets(index);
    for (let set = view.head; set < sparseSteps * heads; set += heads)
      for (let at = begins[set]; at < begins[set + 1]; at++) counts[positions[at]]++;
  }
  return counts;
}

/** Each token's share of a sparse step's mass, mean over the view's layers and heads. */
async function massOf(view, sparse) {
  if (isAll(view)) {
    const map = await massMap();
    return Float64Array.from(map.subarray(sparse * tokens, (sparse + 1) * tokens), (code) => mapShares[code]);
  }
  const mass = new Float64Array(tokens), shown = headsOf(view);
  for (const index of view.members) {
    const {positions, begins, masses} = await layerSets(index);
    for (const head of shown) {
      const set = sparse * heads + head;
      for (let at = begins[set]; at < begins[set + 1]; at++) mass[positions[at]] += masses[at];
    }
  }
  return mass.map((value) => value / (view.members.length * shown.length));
}

/** Each token's share of a step's mass in the view, mean over these sparse steps. */
async function meanMassOf(view, sparse) {
  const mean = new Float64Array(tokens);
  for (const step of sparse)
    (await massOf(view, step)).forEach((value, at) => { mean[at] += value / sparse.length; });
  return mean;
}

/** Of the mass that was recalled in these sparse steps, in and beside the pages that Quest would have read: two sums by token. */
async function questOf(view, sparse) {
  const inside = new Float64Array(tokens), beside = new Float64Array(tokens);
  const shown = headsOf(view), pageSize = facts.server.page_size;
  for (const index of view.members) {
    const {positions, begins, masses} = await layerSets(index), pages = await questSets(index);
    for (const step of sparse)
      for (const head of shown) {
        const set = step * heads + head, read = new Set(pages[set]);
        for (let at = begins[set]; at < begins[set + 1]; at++)
          (read.has(Math.floor(positions[at] / pageSize)) ? inside : beside)[positions[at]] += masses[at];
      }
  }
  return {inside, beside};
}

const usual = new Map();

/** The mean over the answer's sparse steps. */
async function usualMassOf(view) {
  const key = JSON.stringify(view);
  if (!usual.has(key)) usual.set(key, await meanMassOf(view, [...Array(sparseSteps).keys()]));
  return usual.get(key);
}

/** Shares of the mass in the view, mean over these sparse steps: [always read, recalled, estimated]. */
async function sharesOf(view, sparse) {
  const mass = await allMass(), shares = [0, 0, 0], shown = headsOf(view);
  for (const step of sparse)
    for (const index of view.members)
      for (const head of shown)
        for (let part = 0; part < 3; part++)
          shares[part] += mass[((index * sparseSteps + step) * heads + head) * 3 + part] / 65535;
  return shares.map((share) => share / (sparse.length * view.members.length * shown.length));
}
