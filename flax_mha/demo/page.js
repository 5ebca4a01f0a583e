"use strict";

const at = id => document.getElementById(id);
const maps = JSON.parse(at("data").textContent).map(decode);
const state = { map: 0, head: 0, query: 0, scale: "root" };
const hover = { query: null, key: null };
const picture = document.createElement("canvas");  // the head's weights, a pixel each
let ramp = [];                                     // 256 colours, [red, green, blue]
let cells = { left: 0, top: 0, size: 1 };          // where the matrix has its cells

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

// --- colours -------------------------------------------------------------------------------------

function makeRamp() {
  const style = getComputedStyle(document.documentElement);
  const [low, high] = ["--low", "--high"].map(name => style.getPropertyValue(name).trim().split(" ").map(Number));
  const mix = share => low.map((start, i) => start + share * (high[i] - start));
  return Array.from({ length: 256 }, (_, i) => rgb(mix(i / 255)));
}

// From OKLab (Ottosson, 2020) to sRGB.
function rgb([lightness, a, b]) {
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map(encoded);
}

function encoded(light) {
  const bounded = Math.min(Math.max(light, 0), 1);
  return Math.round(255 * (bounded <= 0.0031308 ? 12.92 * bounded : 1.055 * bounded ** (1 / 2.4) - 0.055));
}

function share(weight) {
  const part = map().max ? weight / map().max : 0;
  return state.scale === "root" ? Math.sqrt(part) : part;
}

const color = weight => ramp[Math.round(255 * share(weight))];
const css = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;
const inkOn = ([red, green, blue]) => 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
const themed = name => getComputedStyle(document.documentElement).getPropertyValue(name);

// --- drawing -------------------------------------------------------------------------------------

/** Paints one pixel a weight on `canvas`, and gives it that many pixels. */
function paint(canvas, columns, weights) {
  canvas.width = columns;
  canvas.height = weights.length / columns;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, canvas.height);
  weights.forEach((weight, i) => {
    const [red, green, blue] = color(weight);
    image.data[4 * i] = red;
    image.data[4 * i + 1] = green;
    image.data[4 * i + 2] = blue;
    image.data[4 * i + 3] = 255;
  });
  context.putImageData(image, 0, 0);
}

/** A context that draws in CSS pixels, sharp on every screen. */
function sharp(canvas, width, height) {
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(devicePixelRatio, devicePixelRatio);
  context.imageSmoothingEnabled = false;
  return context;
}

function drawLegend() {
  const { max } = map(), canvas = at("legend").querySelector("canvas");
  const steps = Array.from({ length: 256 }, (_, i) => i / 255);
  paint(canvas, 256, steps.map(step => max * (state.scale === "root" ? step ** 2 : step)));
  at("ticks").replaceChildren(...[0, 0.25, 0.5, 0.75, 1].map(step => tick(step, max)));
}

function tick(step, max) {
  const span = document.createElement("span");
  span.textContent = (max * (state.scale === "root" ? step ** 2 : step)).toFixed(3);
  span.style.left = `${100 * step}%`;
  return span;
}

function drawHeads() {
  const T = map().queries.length, { image } = map();
  [...at("heads").children].forEach((button, head) => {
    button.setAttribute("aria-pressed", head === state.head);
    const canvas = button.querySelector("canvas");
    if (image) paint(canvas, image.columns, row(head));
    else paint(canvas, map().keys.length, rows(head, 0, T));
    canvas.classList.toggle("coarse", canvas.width < 88);
  });
}

/** The largest cells for which the matrix fits the room there is, but none too small to hit. */
function layOut() {
  const { queries, keys } = map(), room = at("matrix").parentElement.clientWidth;
  const left = gutter(queries), top = gutter(keys);
  const size = Math.min((room - left - 2) / keys.length, 560 / queries.length, 28);
  cells = { left, top, size: Math.max(size, 3) };
}

const gutter = labels => 8 + 7.3 * Math.max(...labels.map(label => short(label).length));
const short = label => label.length > 14 ? `${label.slice(0, 13)}…` : label;

function drawMatrix() {
  layOut();
  const { queries, keys } = map(), { left, top, size } = cells;
  const width = keys.length * size, height = queries.length * size;
  const context = sharp(at("matrix"), left + width + 2, top + height + 2);
  context.drawImage(picture, left, top, width, height);
  context.strokeStyle = themed("--line");
  context.strokeRect(left, top, width, height);
  label(context, queries, query(), i => [left - 5, top + (i + 0.5) * size, 0, "right"]);
  label(context, keys, hover.key, i => [left + (i + 0.5) * size, top - 5, -Math.PI / 2, "left"]);
  context.strokeStyle = themed("--accent");
  context.lineWidth = 2;
  context.strokeRect(left, top + query() * size, width, size);
  if (hover.key !== null) context.strokeRect(left + hover.key * size, top, size, height);
}

/** As many of the labels as there is room for, `active` in any case. */
function label(context, labels, active, place) {
  const step = Math.ceil(12 / cells.size);
  labels.forEach((text, i) => {
    const crowded = active !== null && Math.abs(i - active) < step;
    if (i !== active && (i % step || crowded)) return;
    const [x, y, angle, align] = place(i);
    context.save();
    context.translate(x, y);
    context.rotate(angle);
    context.font = `${i === active ? "bold " : ""}12px ui-monospace, monospace`;
    context.fillStyle = themed(i === active ? "--accent" : "--text");
    context.textAlign = align;
    context.textBaseline = "middle";
    context.fillText(short(text), 0, 0);
    context.restore();
  });
}

function drawPictures() {
  const { image } = map();
  at("pictures").hidden = !image;
  if (!image) return;
  const weights = row(), gray = i => css(Array(3).fill(image.pixels[i]));
  drawPixels(at("image"), gray, gray);
  drawPixels(at("heat"), i => css(color(weights[i])), gray);
}

/** Each pixel of the image as a frame and a middle; the one that attends is ringed. */
function drawPixels(canvas, frame, middle) {
  const { rows, columns } = map().image, size = canvas.parentElement.clientWidth / columns;
  const context = sharp(canvas, columns * size, rows * size);
  const square = (i, inset) => [i % columns * size + inset, Math.floor(i / columns) * size + inset, size - 2 * inset, size - 2 * inset];
  for (let i = 0; i < rows * columns; i++) {
    context.fillStyle = frame(i);
    context.fillRect(...square(i, 0));
    context.fillStyle = middle(i);
    context.fillRect(...square(i, size / 4));
  }
  context.lineWidth = 3;
  context.strokeStyle = themed("--accent");
  context.strokeRect(...square(query(), 1.5));
}

// --- text ----------------------------------------------------------------------------------------

function makeTokens(list, labels, role) {
  list.classList.toggle("words", labels.filter(label => label.length > 1).length > labels.length / 2);
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
  const weights = row(), { queries, keys } = map();
  const most = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, 5);
  const named = most.filter(i => weights[i]).map(i => `${keys[i]} (${i}) ${weights[i].toFixed(3)}`);
  const whom = named.length ? `attends most to ${named.join(", ")}` : "attends to no key";
  at("most").textContent = `Head ${state.head}, query ${query()}, ${queries[query()]}: ${whom}`;
}

function writeReadout() {
  const { key } = hover, weight = key === null ? 0 : row()[key];
  at("readout").textContent = key === null ? "" : `to key ${key}, ${map().keys[key]}: ${weight.toFixed(3)}`;
}

// --- state ---------------------------------------------------------------------------------------

function build() {
  at("map").value = state.map;
  at("text").open = !map().image;
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
  writeHash();
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
  return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}

// Later, for a browser refuses an address that changes with every repeat of a held key.
function writeHash() {
  clearTimeout(writeHash.timer);
  const { map, head, query, scale } = state;
  const hash = `#map=${map}&head=${head}&query=${query}&scale=${scale}`;
  writeHash.timer = setTimeout(() => history.replaceState(null, "", location.href.split("#")[0] + hash), 200);
}

// --- events --------------------------------------------------------------------------------------

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("select")) return;
  const line = map().image?.columns ?? 1;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -line, ArrowDown: line };
  const turns = { "[": -1, "]": 1 };
  if (event.key in steps) move(steps[event.key]);
  else if (event.key in turns) choose({ head: state.head + turns[event.key] });
  else return;
  event.preventDefault();
}

function move(step) {
  hover.query = null;
  const query = state.query + step;
  if (query >= 0 && query < map().queries.length) choose({ query });
}

function cellAt(event) {
  const { left, top, size } = cells;
  const key = Math.floor((event.offsetX - left) / size), query = Math.floor((event.offsetY - top) / size);
  const inside = key >= 0 && key < map().keys.length && query >= 0 && query < map().queries.length;
  return inside ? { query, key } : { query: null, key: null };
}

function pixelAt(event) {
  const { rows, columns } = map().image, size = event.target.clientWidth / columns;
  const row = Math.floor(event.offsetY / size), column = Math.floor(event.offsetX / size);
  return row >= 0 && row < rows && column >= 0 && column < columns ? row * columns + column : null;
}

const tokenAt = event => event.target.matches("span") ? Number(event.target.id.split("-")[1]) : null;

/** What is under the pointer is shown while it is there, and a click on it makes it the query. */
function watch(id, under) {
  at(id).addEventListener("pointermove", event => point(under(event)));
  at(id).addEventListener("pointerleave", () => point({ query: null, key: null }));
  at(id).addEventListener("click", event => choose({ query: under(event).query ?? state.query }));
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
}

start();
