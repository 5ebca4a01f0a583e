"use strict";
// The canvases of the page, drawn from what page.js holds: state, hover, map(), row().

const picture = document.createElement("canvas");  // the head's weights, a pixel each
let ramp = [];                                     // 256 colours, [red, green, blue]
let cells = { left: 0, top: 0, size: 1 };          // where the matrix has its cells

// --- colours -------------------------------------------------------------------------------------

/** 256 colours along the theme's path through OKLab, at equal distances. */
function makeRamp() {
  const path = themed("--ramp").split(",").map(point => point.trim().split(" ").map(Number));
  const lengths = path.slice(1).map((point, i) => distance(path[i], point));
  const whole = lengths.reduce((a, b) => a + b);
  return Array.from({ length: 256 }, (_, i) => rgb(along(path, lengths, whole * i / 255)));
}

const distance = (from, to) => Math.hypot(...to.map((x, i) => x - from[i]));

function along(path, lengths, way) {
  let i = 0;
  while (i < lengths.length - 1 && way > lengths[i]) way -= lengths[i++];
  return path[i].map((x, axis) => x + way / lengths[i] * (path[i + 1][axis] - x));
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
  const x = Math.min(Math.max(light, 0), 1);
  return Math.round(255 * (x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055));
}

/** Where a weight lies on the scale, from 0 to 1; and the weight at a place of the scale. */
function share(weight) {
  const part = map().max ? weight / map().max : 0;
  return state.scale === "root" ? Math.sqrt(part) : part;
}

const weightAt = share => map().max * (state.scale === "root" ? share ** 2 : share);

const color = weight => ramp[Math.round(255 * share(weight))];
const css = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;
const isLight = ([red, green, blue]) => 0.299 * red + 0.587 * green + 0.114 * blue > 118;
const inkOn = color => isLight(color) ? "#000" : "#fff";
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
  paint(at("scale-colours"), 256, ramp.map((_, i) => weightAt(i / 255)));
  at("ticks").replaceChildren(...[0, 0.25, 0.5, 0.75, 1].map(makeTick));
}

function makeTick(share) {
  const span = document.createElement("span");
  span.textContent = weightAt(share).toFixed(3);
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

/** The largest cells that fit the room there is; if too small to hit, larger, and it scrolls. */
function layOut() {
  const { queries, keys } = map(), room = at("matrix").parentElement.clientWidth;
  const left = gutter(queries), top = gutter(keys);
  const size = Math.min((room - left - 2) / keys.length, 560 / queries.length, 28);
  const least = Math.min(3, 1500 / Math.max(keys.length, queries.length));
  cells = { left, top, size: Math.max(size, least) };
}

const longest = labels => Math.max(...labels.map(label => short(label).length));
const gutter = labels => 8 + 7.3 * Math.max(longest(labels), 2);
const short = label => label.length > 14 ? `${label.slice(0, 13)}…` : label;

function drawMatrix() {
  layOut();
  const { queries, keys } = map(), { left, top, size } = cells;
  const sizes = `${queries.length} queries, ${keys.length} keys`;
  at("matrix").setAttribute("aria-label", `The weights of head ${state.head}: ${sizes}`);
  const width = keys.length * size, height = queries.length * size;
  const context = sharp(at("matrix"), left + width + 2, top + height + 2);
  context.drawImage(picture, left, top, width, height);
  context.strokeStyle = themed("--line");
  context.strokeRect(left, top, width, height);
  const above = longest(keys) < 3 ? [top - 9, 0, "center"] : [top - 5, -Math.PI / 2, "left"];
  label(context, queries, query(), i => [left - 5, top + (i + 0.5) * size, 0, "right"]);
  label(context, keys, hover.key, i => [left + (i + 0.5) * size, ...above]);
  context.strokeStyle = themed("--accent");
  context.lineWidth = 2;
  context.strokeRect(left, top + query() * size - 1, width, size + 2);
  if (hover.key !== null) context.strokeRect(left + hover.key * size - 1, top, size + 2, height);
}

/** As many of the labels as there is room for, `active` in any case. */
function label(context, labels, active, place) {
  const step = Math.ceil(15 / cells.size), color = themed("--text"), accent = themed("--accent");
  context.textBaseline = "middle";
  labels.forEach((text, i) => {
    const crowded = active !== null && Math.abs(i - active) < step;
    if (i !== active && (i % step || crowded)) return;
    context.font = `${i === active ? "bold " : ""}12px ui-monospace, monospace`;
    context.fillStyle = i === active ? accent : color;
    write(context, short(text), ...place(i));
  });
}

function write(context, text, x, y, angle, align) {
  context.save();
  context.translate(x, y);
  context.rotate(angle);
  context.textAlign = align;
  context.fillText(text, 0, 0);
  context.restore();
}

function drawPictures() {
  const { image } = map();
  if (!image) return;
  at("image").setAttribute("aria-label", `The image; pixel ${map().queries[query()]} attends`);
  at("heat").setAttribute("aria-label", `What pixel ${map().queries[query()]} attends to`);
  const weights = row(), brightness = i => image.pixels[i] / 255, accent = themed("--accent");
  drawPixels(at("image"), i => css(Array(3).fill(image.pixels[i])), () => 0, accent);
  drawPixels(at("heat"), i => css(color(weights[i])), brightness, accent);
}

/** A square and a dot for each pixel of the image, and a ring around the one that attends. */
function drawPixels(canvas, ground, dot, accent) {
  const { rows, columns } = map().image, size = canvas.parentElement.clientWidth / columns;
  const context = sharp(canvas, columns * size, rows * size);
  context.lineWidth = 3;
  context.strokeStyle = accent;
  const corner = i => [i % columns * size, Math.floor(i / columns) * size];
  for (let i = 0; i < rows * columns; i++) {
    const [x, y] = corner(i);
    context.fillStyle = ground(i);
    context.fillRect(x, y, size + 0.5, size + 0.5);
    drawDot(context, x + size / 2, y + size / 2, 0.26 * size * Math.sqrt(dot(i)), accent);
  }
  const [x, y] = corner(query());
  context.strokeRect(x + 1.5, y + 1.5, size - 3, size - 3);
}

function drawDot(context, x, y, radius, color) {
  context.fillStyle = color;
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}
