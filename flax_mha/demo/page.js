"use strict";
// What is shown: the maps, their text, the state, and the events that change it.

const at = id => document.getElementById(id);
const maps = JSON.parse(at("data").textContent).map(decode);
const state = { map: 0, head: 0, query: 0, scale: "root" };
const hover = { query: null, key: null };

// --- data ----------------------------------------------------------------------------------------

function bytes(text) {
  return Uint8Array.from(atob(text), character => character.charCodeAt(0));
}

function decode(map) {
  const weights = Float32Array.from(bytes(map.weights), byte => (byte / 255) ** 2);
  const image = map.image && { ...map.image, pixels: bytes(map.image.pixels) };
  return { ...map, weights, image, max: weights.reduce((a, b) => Math.max(a, b)) };
}

const map = () => maps[state.map];
const query = () => hover.query ?? state.query;

/** The weights of `count` queries of a head, from one query on. */
function rows(head, query, count) {
  const T = map().queries.length, S = map().keys.length, start = (head * T + query) * S;
  return map().weights.subarray(start, start + count * S);
}

const row = (head = state.head) => rows(head, query(), 1);

// --- text ----------------------------------------------------------------------------------------

function makeTokens(list, labels, role) {
  const long = labels.filter(label => label.length > 1);
  list.classList.toggle("words", long.length > labels.length / 2);
  list.replaceChildren(...labels.flatMap((label, i) => {
    const span = document.createElement("span");
    span.textContent = label;
    span.id = `${list.id}-${i}`;
    span.setAttribute("role", role);
    return label.endsWith("↵") ? [span, document.createElement("br")] : [span];
  }));
}

const tokens = list => list.querySelectorAll("span");

function drawTokens() {
  tokens(at("queries")).forEach((span, i) => {
    span.setAttribute("aria-selected", i === state.query);
    span.classList.toggle("active", i === query());
  });
  at("queries").setAttribute("aria-activedescendant", `queries-${state.query}`);
  const weights = row();
  at("keys").style.background = css(color(0));
  tokens(at("keys")).forEach((span, i) => {
    const background = color(weights[i]);
    span.style.background = css(background);
    span.style.color = inkOn(background);
    span.title = `${i}: ${weights[i].toFixed(3)}`;
    span.setAttribute("aria-label", `${map().keys[i]} ${weights[i].toFixed(3)}`);
    span.classList.toggle("active", i === hover.key);
  });
}

function writeMost() {
  const weights = row(), all = [...weights.keys()].sort((a, b) => weights[b] - weights[a]);
  const most = all.filter(key => weights[key]).slice(0, 5).map(nameKey);
  const whom = most.length ? `attends most to ${most.join(", ")}` : "attends to no key";
  const who = `query “${map().queries[query()]}” (${query()})`;
  at("most").textContent = `Head ${state.head}, ${who} ${whom}`;
}

const nameKey = key => `“${map().keys[key]}” (${key}) ${row()[key].toFixed(3)}`;

function writeReadout() {
  at("readout").textContent = hover.key === null ? "" : `… to ${nameKey(hover.key)}`;
}

// --- state ---------------------------------------------------------------------------------------

function build() {
  Object.assign(hover, { query: null, key: null });
  at("map").value = state.map;
  at("text").open = !map().image;
  document.body.classList.toggle("tiled", map().image !== null);
  at("heads").replaceChildren(...Array.from({ length: map().heads }, (_, head) => makeHead(head)));
  makeTokens(at("queries"), map().queries, "option");
  makeTokens(at("keys"), map().keys, "listitem");
}

function makeHead(head) {
  const button = document.createElement("button");
  button.append(document.createElement("canvas"), `head ${head}`);
  button.addEventListener("click", () => choose({ head }));
  return button;
}

function recolor() {
  at("scale").value = state.scale;
  ramp = makeRamp();
  paint(picture, map().keys.length, rows(state.head, 0, map().queries.length));
  drawLegend();
  drawHeads();
  render();
}

function render() {
  if (map().image) drawHeads();
  drawMatrix();
  drawPictures();
  drawTokens();
  writeMost();
  writeReadout();
}

function choose(change) {
  const before = { ...state };
  Object.assign(state, change);
  bound();
  if (state.map !== before.map) build();
  if (["map", "head", "scale"].some(name => state[name] !== before[name])) recolor();
  else render();
  keepQueryInView();
  writeHash();
}

/** Scrolls the list alone: `scrollIntoView` would move the page as well. */
function keepQueryInView() {
  const list = at("queries"), room = list.clientHeight;
  const { offsetTop: top, offsetHeight: height } = at(`queries-${state.query}`);
  list.scrollTop = Math.max(Math.min(list.scrollTop, top), top + height - room);
}

function bound() {
  const within = (value, count) => Math.min(Math.max(Math.trunc(value) || 0, 0), count - 1);
  state.map = within(state.map, maps.length);
  state.head = within(state.head, map().heads);
  state.query = within(state.query, map().queries.length);
  state.scale = state.scale === "linear" ? "linear" : "root";
}

function point(change) {
  if (Object.keys(change).every(name => hover[name] === change[name])) return;
  Object.assign(hover, change);
  render();
}

function readHash() {
  return { scale: "root", ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
}

// Later, for a browser refuses an address that changes with every repeat of a held key.
function writeHash() {
  clearTimeout(writeHash.timer);
  writeHash.timer = setTimeout(() => history.replaceState(null, "", address()), 200);
}

function address() {
  const { map, head, query, scale } = state, shown = scale === "root" ? "" : `&scale=${scale}`;
  return `${location.href.split("#")[0]}#map=${map}&head=${head}&query=${query}${shown}`;
}

// --- events --------------------------------------------------------------------------------------

function onKey(event) {
  if (event.metaKey || event.target.matches("select")) return;
  const { ctrlKey, altKey } = event;
  const line = map().image?.columns ?? 1;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -line, ArrowDown: line };
  const turns = { "[": -1, "]": 1 };
  if (event.key in steps && !ctrlKey && !altKey) move(steps[event.key]);
  // Many keyboards make a bracket with Alt, and Windows calls that Ctrl and Alt.
  else if (event.key in turns && ctrlKey <= altKey) choose({ head: state.head + turns[event.key] });
  else return;
  event.preventDefault();
}

function move(step) {
  hover.query = null;
  const query = state.query + step;
  if (isPlace(query, map().queries)) choose({ query });
}

const isPlace = (i, labels) => i >= 0 && i < labels.length;

function cellAt(event) {
  const { left, top, size } = cells;
  const query = Math.floor((event.offsetY - top) / size);
  const key = Math.floor((event.offsetX - left) / size);
  const inside = isPlace(query, map().queries) && isPlace(key, map().keys);
  return inside ? { query, key } : { query: null, key: null };
}

function pixelAt(event) {
  const { rows, columns } = map().image, size = event.target.clientWidth / columns;
  const y = Math.floor(event.offsetY / size), x = Math.floor(event.offsetX / size);
  return y >= 0 && y < rows && x >= 0 && x < columns ? y * columns + x : null;
}

function tokenAt({ target }) {
  return target.matches("span") ? Number(target.id.split("-")[1]) : null;
}

/** What is under a pointer shows while it is there; a click, or a tap, makes it the query. */
function watch(id, under) {
  at(id).addEventListener("pointermove", event => point(under(event)));
  at(id).addEventListener("pointerleave", () => point({ query: null, key: null }));
  at(id).addEventListener("click", event => {
    const { query, key } = under(event);
    Object.assign(hover, { query: null, key });
    choose({ query: query ?? state.query });
  });
}

function start() {
  at("map").append(...maps.map(({ name }, i) => new Option(name, i)));
  at("map").addEventListener("change", event => choose({ map: event.target.value }));
  at("scale").addEventListener("change", event => choose({ scale: event.target.value }));
  watch("matrix", cellAt);
  watch("image", event => ({ query: pixelAt(event), key: null }));
  watch("heat", event => ({ query: null, key: pixelAt(event) }));
  watch("queries", event => ({ query: tokenAt(event), key: null }));
  watch("keys", event => ({ query: null, key: tokenAt(event) }));
  addEventListener("keydown", onKey);
  addEventListener("resize", render);
  addEventListener("hashchange", () => choose(readHash()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolor);
  Object.assign(state, readHash());
  bound();
  build();
  recolor();
  keepQueryInView();
}

start();
