// The page: what is chosen, and the panels that show it. All text from the data goes in as textContent.

import * as api from "./api.js";
import { PointMap } from "./map.js";

const PALETTE = [
  "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#d9b62b", "#9d755d", "#ff8fa0", "#1f9ed1",
  "#c44e9b", "#7fb800", "#8a63d2", "#d1662f", "#2fb8a0", "#a1a832", "#6f8bff", "#b5586f", "#5d8f6b", "#79a6c9",
].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
const GREY = [140, 142, 148];
const KS = [5, 10, 20, 50, 100];
const TILES = 240; // thumbnails of a selection that are shown

const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const state = {
  about: null, codes: [], side: 0, colour: -1, k: 10,
  hidden: [], // for each column the categories that are switched off; -1 are those without, "rest" those without a colour
  colours: [], // for each column category -> index into the palette, or undefined
  matches: null, // 1 for each row whose name contains the text, or null
  selected: new Uint32Array(0),
  query: null, // {row} or {file, address}
};
let map;

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function say(message, error = false) {
  if ([...$("notices").children].some((shown) => shown.firstChild.textContent === message)) return;
  const notice = element("div", { className: error ? "notice error" : "notice" }, element("span", { textContent: message }));
  const close = element("button", { textContent: "×", title: "Close", className: "quiet", onclick: () => notice.remove() });
  notice.append(close);
  $("notices").append(notice);
}

/** Run something that asks the server; what goes wrong is shown. */
async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    if (!(error instanceof api.Refused)) throw error;
    say(error.message, true);
    return null;
  }
}

// --- pictures

function picture(row, size) {
  const image = element("img", { alt: "", loading: "lazy", decoding: "async", draggable: false });
  image.onload = () => image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) <= 64);
  image.onerror = () => image.classList.add("missing");
  if (state.about.thumbnails) image.src = api.imageOf(row, size);
  else image.classList.add("missing");
  return image;
}

/** Category of a row in the column that colours the map, else in the first. */
function tag(row) {
  const column = Math.max(0, state.colour);
  if (!state.codes[column]) return null;
  const code = state.codes[column][row];
  const name = code < 0 ? `no ${state.about.columns[column].name}` : state.about.columns[column].categories[code];
  const dot = element("span", { className: "dot" });
  dot.style.background = `rgb(${colourOf(column, code).join(" ")})`;
  return element("span", { className: "tag", title: name }, dot, element("span", { textContent: name }));
}

function tile(row, similarity, common = false) {
  const made = element("button", { className: common ? "tile common" : "tile", onclick: () => visit(row) }, picture(row, "thumbnail"));
  made.dataset.row = row;
  if (similarity === undefined) {
    made.onmouseenter = made.onfocus = async () => { made.title = (await api.item(row)).name; };
    made.ariaLabel = `picture ${row}`;
    return made;
  }
  made.append(element("span", { className: "facts" }, tag(row), element("span", { textContent: similarity.toFixed(3) })));
  return made;
}

// --- colours, legend, filter

const rank = (column, code) => (code < 0 ? undefined : state.colours[column].get(code));
const colourOf = (column, code) => PALETTE[rank(column, code)] || GREY;
const key = (column, code) => (code < 0 ? -1 : rank(column, code) === undefined ? "rest" : code);

/** The most frequent categories get a colour each. */
function assignColours(codes, categories) {
  const counts = new Uint32Array(categories.length);
  for (const code of codes) if (code >= 0) counts[code]++;
  let order = [...counts.keys()];
  if (order.length > PALETTE.length) {
    order = order.sort((a, b) => counts[b] - counts[a]).slice(0, PALETTE.length).sort((a, b) => a - b);
  }
  return new Map(order.map((code, place) => [code, place]));
}

// Styles: 0 hidden, 1 to 20 the palette, 21 grey, 22 backdrop (shown, but not what is looked for).
const GREY_STYLE = PALETTE.length + 1, BACKDROP = PALETTE.length + 2;

function restyle() {
  const { about, colour, codes, matches } = state;
  const styles = new Uint8Array(about.count);
  const column = codes[colour], hidden = state.hidden[colour];
  let shown = 0;
  for (let row = 0; row < about.count; row++) {
    let style = GREY_STYLE;
    if (column) {
      const place = rank(colour, column[row]);
      style = place === undefined ? GREY_STYLE : place + 1;
      if (hidden.size && hidden.has(key(colour, column[row]))) style = 0;
    }
    if (style && matches && !matches[row]) style = BACKDROP;
    if (style && style < BACKDROP) shown++;
    styles[row] = style;
  }
  const opacity = about.count > 20000 ? 0.75 : 0.9;
  const plain = column ? GREY : PALETTE[0];
  const colours = [[0, 0, 0, 0], ...PALETTE.map((rgb) => [...rgb, opacity]), [...plain, opacity], [...GREY, 0.13]];
  map.setStyles(styles, colours, BACKDROP);
  state.styles = styles;
  $("select-shown").textContent = `Select the ${number(shown)} shown`;
  $("select-shown").disabled = shown === 0;
  const part = shown < about.count ? `${number(shown)} of ` : "";
  $("status").textContent = `${part}${number(about.count)} pictures · ${about.sides[state.side].how} · ${map.renderer.name}`;
}

function drawLegend() {
  const { about, colour, codes } = state;
  $("legend").hidden = colour < 0;
  map.inset = colour < 0 ? 0 : 226;
  if (map.fitted) map.fit();
  if (colour < 0) return;
  const column = about.columns[colour], hidden = state.hidden[colour];
  const counts = new Map();
  for (const code of codes[colour]) counts.set(key(colour, code), (counts.get(key(colour, code)) || 0) + 1);
  $("legend-title").textContent = column.name[0].toUpperCase() + column.name.slice(1);
  $("legend-title").title = column.about;
  const entries = [...state.colours[colour].keys(), "rest", -1].filter((entry) => counts.has(entry));
  $("legend-list").replaceChildren(...entries.map((entry) => {
    const name = entry === -1 ? `no ${column.name}` : entry === "rest" ? `${number(column.categories.length - PALETTE.length)} others` : column.categories[entry];
    const dot = element("span", { className: "dot" });
    dot.style.background = `rgb(${(entry === "rest" ? GREY : colourOf(colour, entry)).join(" ")})`;
    const button = element("button", { title: `${name}\nClick: hide or show. Double-click: only this, or all.` }, dot,
      element("span", { className: "name", textContent: name }),
      element("span", { className: "count", textContent: number(counts.get(entry)) }));
    button.ariaPressed = String(!hidden.has(entry));
    button.onclick = () => {
      if (!hidden.delete(entry)) hidden.add(entry);
      button.ariaPressed = String(!hidden.has(entry));
      restyle();
    };
    button.ondblclick = () => {
      const alone = hidden.size === entries.length - 1 && !hidden.has(entry);
      hidden.clear();
      if (!alone) entries.filter((other) => other !== entry).forEach((other) => hidden.add(other));
      [...$("legend-list").children].forEach((other, i) => { other.ariaPressed = String(!hidden.has(entries[i])); });
      restyle();
    };
    return button;
  }));
}

function setColour(column) {
  state.colour = column;
  $("colour").value = column;
  drawLegend();
  restyle();
  drawResult();
}

let asked = 0;
async function setFilter(text) {
  const turn = ++asked;
  const rows = text ? await attempt(() => api.matching(text)) : null;
  if (turn !== asked) return; // a later one is on its way
  state.matches = rows && new Uint8Array(state.about.count);
  rows?.forEach((row) => { state.matches[row] = 1; });
  restyle();
}

// --- neighbours

/** Show a row; the address changes, so that the browser's Back goes to the one before. */
function visit(row) {
  if (location.hash === `#${row}`) showRow(row);
  else location.hash = row;
}

async function showRow(row) {
  const answer = await attempt(() => api.neighbours(row, state.k));
  if (!answer) return;
  state.query = { row, name: answer.query.name };
  state.answer = answer;
  drawResult();
  map.reveal(row);
}

async function showFile(file) {
  if (!state.about.upload) return say("No search by a picture of your own: the encoder is not at hand.", true);
  if (file.size > state.about.upload_bytes) return say("The picture is too large.", true);
  $("upload").disabled = true;
  const answer = await attempt(() => api.search(file, state.k));
  $("upload").disabled = false;
  if (!answer) return;
  if (state.query?.address && state.query.file !== file) URL.revokeObjectURL(state.query.address);
  state.query = { file, name: file.name, address: state.query?.file === file ? state.query.address : URL.createObjectURL(file) };
  state.answer = answer;
  if (location.hash) history.pushState(null, "", location.pathname + location.search);
  drawResult();
}

function again() {
  if (state.query?.file) showFile(state.query.file);
  else if (state.query) showRow(state.query.row);
}

function drawResult() {
  const { query, answer, about } = state;
  if (!query) return;
  $("welcome").hidden = true;
  $("result").hidden = false;
  const own = query.file ? element("img", { src: query.address, alt: "" }) : picture(query.row, "picture");
  $("query").replaceChildren(element("div", { className: "card" }, own, element("div", {},
    element("span", { className: "name", textContent: query.name }),
    query.file ? element("span", { className: "hint", textContent: "your picture" }) : tag(query.row))));
  const lists = answer.sides;
  const rows = lists.map((list) => new Set((list || []).map((entry) => entry.row)));
  const common = rows.length === 2 ? new Set([...rows[0]].filter((row) => rows[1].has(row))) : new Set();
  const tiles = (list) => element("div", { className: "tiles" }, ...list.map((entry) => tile(entry.row, entry.similarity, common.has(entry.row))));
  if (lists.length === 1) {
    $("result-title").textContent = "Nearest by cosine similarity";
    $("neighbours").replaceChildren(tiles(lists[0] || []));
  } else {
    const both = lists.every((list) => list);
    $("result-title").textContent = both ? `${common.size} of ${lists[0].length} in common` : "Nearest";
    $("neighbours").replaceChildren(element("div", { className: "versus" }, ...lists.map((list, side) => element("div", {},
      element("h3", { textContent: about.sides[side].name, title: about.sides[side].name }),
      list ? tiles(list) : element("p", { className: "hint", textContent: "its encoder is not at hand" })))));
  }
  map.setMarks({ query: query.file ? -1 : query.row, near: [...rows[state.side]], far: rows.length === 2 ? [...rows[1 - state.side]] : [] });
}

// --- selection

function setSelection(rows, add = false) {
  state.selected = add ? Uint32Array.from(new Set([...state.selected, ...rows])).sort() : rows;
  const { selected } = state;
  $("selection").hidden = selected.length === 0;
  const more = selected.length > TILES ? `, the first ${TILES} shown` : "";
  $("selection-title").textContent = `${number(selected.length)} selected${more}`;
  $("selected").replaceChildren(...Array.from(selected.subarray(0, TILES), (row) => tile(row)));
  map.setMarks({ selected });
}

async function save(format) {
  const list = await attempt(() => api.selection(state.selected, format));
  if (!list) return;
  const link = element("a", { href: URL.createObjectURL(list), download: `selection.${format}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- hover

async function showHover(row, x, y) {
  const card = $("hover");
  card.hidden = row < 0;
  if (row < 0) return;
  const name = element("span", { className: "name" });
  card.replaceChildren(...[state.about.thumbnails ? picture(row, "picture") : null, name, tag(row)].filter((part) => part));
  const { width, height } = map.view;
  card.style.left = `${x + 178 > width ? x - 172 : x + 14}px`;
  card.style.top = `${Math.max(6, Math.min(y - 60, height - 222))}px`;
  card.dataset.row = row;
  const item = await attempt(() => api.item(row));
  if (item && Number(card.dataset.row) === row) name.textContent = item.name;
}

// --- start

function listen() {
  $("colour").onchange = () => setColour(Number($("colour").value));
  let pause;
  $("filter").oninput = () => {
    clearTimeout(pause);
    pause = setTimeout(() => setFilter($("filter").value.trim()), 120);
  };
  $("k").onchange = () => { state.k = Number($("k").value); again(); };
  $("upload").onclick = () => $("file").click();
  $("file").onchange = () => { if ($("file").files[0]) showFile($("file").files[0]); $("file").value = ""; };
  $("clear").onclick = () => setSelection(new Uint32Array(0));
  $("export-csv").onclick = () => save("csv");
  $("export-txt").onclick = () => save("txt");
  $("select-shown").onclick = () =>
    setSelection(Uint32Array.from(state.styles.keys()).filter((row) => state.styles[row] && state.styles[row] < BACKDROP));
  $("nearer").onclick = () => map.zoom(1.5);
  $("farther").onclick = () => map.zoom(1 / 1.5);
  $("fit").onclick = () => map.fit();
  for (const button of document.querySelectorAll("[data-mode]")) button.onclick = () => map.setMode(button.dataset.mode);
  addEventListener("hashchange", () => followAddress());
  addEventListener("dragover", (event) => { event.preventDefault(); $("drop").hidden = !state.about?.upload; });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
  addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").hidden = true;
    if (event.dataTransfer.files[0]) showFile(event.dataTransfer.files[0]);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => map.dirty());
}

function followAddress() {
  const row = location.hash.slice(1);
  if (/^\d{1,9}$/.test(row) && Number(row) < state.about.count) showRow(Number(row));
}

async function setSide(side) {
  const points = await attempt(() => api.mapOf(side));
  if (!points) return;
  state.side = side;
  [...$("encoders").children].forEach((button, i) => { button.ariaPressed = String(i === side); });
  map.setPoints(points);
  if (state.colour >= 0) restyle();
  if (state.query) drawResult();
}

async function start() {
  const about = (state.about = await api.about());
  document.title = `${about.title} – nnclr explore`;
  $("title").textContent = about.title;
  $("title").title = about.title;
  about.notices.forEach((notice) => say(notice));
  $("upload").disabled = !about.upload;
  document.querySelector(".upload-hint").hidden = !about.upload;
  state.codes = await Promise.all(about.columns.map((_, i) => api.column(i)));
  state.colours = about.columns.map((column, i) => assignColours(state.codes[i], column.categories));
  state.hidden = about.columns.map(() => new Set());
  const options = about.columns.map((column, i) => element("option", { value: i, textContent: column.name, title: column.about }));
  $("colour").replaceChildren(...options, element("option", { value: -1, textContent: "nothing" }));
  $("k").replaceChildren(...KS.map((k) => element("option", { value: k, textContent: k, selected: k === state.k })));
  $("encoders").hidden = about.sides.length < 2;
  $("panel").classList.toggle("wide", about.sides.length > 1);
  $("encoders").replaceChildren(...about.sides.map((side, i) =>
    element("button", { textContent: side.name, title: `Map by ${side.name}`, onclick: () => setSide(i) })));
  const asked = new URLSearchParams(location.search);
  const how = ["canvas", "webgl"].find((name) => asked.get(name) === "1");
  map = new PointMap($("map"), {
    hover: showHover,
    pick: visit,
    select: setSelection,
    mode: (mode) => document.querySelectorAll("[data-mode]").forEach((b) => { b.ariaPressed = String(b.dataset.mode === mode); }),
  }, how, about.thumbnails ? (row) => api.imageOf(row) : null);
  map.resize();
  listen();
  await setSide(0);
  setColour(about.columns.length ? 0 : -1);
  followAddress();
  window.explorer = { map, state }; // for tests, and for those who like to look inside
  document.documentElement.dataset.ready = "yes";
}

attempt(start);
