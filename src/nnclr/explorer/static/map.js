// The map: a view on the points that moves and zooms, finds the point under the pointer, and lets one draw around
// points. Points are drawn by points.js; rings, lines, thumbnails and the lasso lie on a second canvas above.

import { CanvasPoints, WebGLPoints } from "./points.js";

const REACH = 12; // CSS pixels from which a point can be picked
const CLICK = 4; // CSS pixels that a click may move
const PICTURES = 900; // points in view up to which thumbnails are drawn
const TILE = 46; // CSS pixels of such a thumbnail
const FLIGHT = 650; // milliseconds from one encoder's map to the other's

/** Points in square cells, so that those near a place are found without looking at all. */
class Grid {
  constructor(points) {
    const n = points.length / 2;
    this.points = points;
    this.side = Math.max(1, Math.min(512, Math.ceil(Math.sqrt(n / 2))));
    this.start = new Uint32Array(this.side * this.side + 1);
    this.rows = new Uint32Array(n);
    const cells = new Uint32Array(n);
    for (let i = 0; i < n; i++) this.start[(cells[i] = this.cell(points[2 * i]) + this.side * this.cell(points[2 * i + 1])) + 1]++;
    for (let c = 0; c < this.side * this.side; c++) this.start[c + 1] += this.start[c];
    const next = this.start.slice();
    for (let i = 0; i < n; i++) this.rows[next[cells[i]]++] = i;
  }

  cell(value) {
    return Math.max(0, Math.min(this.side - 1, Math.floor(((value + 1) / 2) * this.side)));
  }

  /** Calls visit(row) for the rows in a rectangle, and some beside it, until it returns false. */
  each(left, bottom, right, top, visit) {
    const x0 = this.cell(left), x1 = this.cell(right);
    for (let y = this.cell(bottom); y <= this.cell(top); y++) {
      const end = this.start[y * this.side + x1 + 1];
      for (let i = this.start[y * this.side + x0]; i < end; i++) if (visit(this.rows[i]) === false) return;
    }
  }
}

export class PointMap {
  /**
   * @param {HTMLElement} section holds the canvases #points and #overlay
   * @param {object} on hover(row or -1, x, y), pick(row), select(rows, add), mode(name)
   * @param {string} how "canvas" or "webgl" to draw so whatever the machine has; else what is quicker
   * @param {(row: number) => string} imageOf address of a thumbnail; null where there are none
   */
  constructor(section, on, how, imageOf) {
    this.section = section;
    this.on = on;
    this.imageOf = imageOf;
    this.canvas = section.querySelector("#points");
    this.overlay = section.querySelector("#overlay");
    const accelerated = how === "canvas" ? null : WebGLPoints.on(this.canvas, how === "webgl");
    this.renderer = accelerated || new CanvasPoints(this.canvas);
    this.view = { x: 0, y: 0, scale: 1, width: 1, height: 1, ratio: 1, size: 4 };
    this.mode = "pan";
    this.inset = 0; // CSS pixels at the left that are covered
    this.extent = [1, 1]; // of the points, to each side of the middle
    this.marks = { query: -1, near: [], far: [], selected: new Uint32Array(0) };
    this.path = null; // the lasso or box that is being drawn, CSS pixels
    this.pointers = new Map();
    this.images = new Map();
    this.hovered = -1;
    this.listen();
    new ResizeObserver(() => this.resize()).observe(section);
  }

  /** Show points, Float32Array of x, y; the second time they fly to their new places. */
  setPoints(points) {
    const still = !this.points || matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.from = still ? points : this.points;
    this.points = points;
    this.grid = new Grid(points);
    this.extent = [0, 1].map((axis) => points.reduce((most, v, i) => (i % 2 === axis ? Math.max(most, Math.abs(v)) : most), 0.05));
    this.renderer.setPositions(this.from, points);
    this.departure = still ? null : performance.now();
    if (!this.home || this.fitted) this.fit();
    this.dirty();
  }

  /** A style for each point (0: not shown), the colour of each, and from which style on points are only backdrop. */
  setStyles(styles, colours, backdrop) {
    this.styles = styles;
    this.colours = colours;
    this.backdrop = backdrop;
    this.renderer.setStyles(styles, colours);
    this.dirty();
  }

  setMarks(marks) {
    Object.assign(this.marks, marks);
    this.dirty();
  }

  setMode(mode) {
    this.mode = mode;
    this.overlay.classList.toggle("lasso", mode === "lasso");
    this.overlay.classList.toggle("box", mode === "box");
    this.on.mode(mode);
  }

  live(row) {
    return this.styles[row] !== 0 && this.styles[row] < this.backdrop;
  }

  // --- view

  resize() {
    const { view } = this;
    view.width = Math.max(1, this.section.clientWidth);
    view.height = Math.max(1, this.section.clientHeight);
    view.ratio = window.devicePixelRatio || 1;
    for (const canvas of [this.canvas, this.overlay]) {
      canvas.width = Math.round(view.width * view.ratio);
      canvas.height = Math.round(view.height * view.ratio);
    }
    if (this.fitted) this.fit();
    this.dirty();
  }

  fit() {
    const { view } = this;
    const room = Math.max(view.width - this.inset, view.width / 2);
    view.scale = 0.45 * Math.min(room / this.extent[0], (view.height - 40) / this.extent[1]);
    view.x = (room - view.width) / 2 / view.scale;
    view.y = 0;
    this.home = view.scale;
    this.fitted = true;
    this.dirty();
  }

  zoom(factor, x = this.view.width / 2, y = this.view.height / 2) {
    const { view } = this;
    const [px, py] = this.toMap(x, y);
    view.scale = Math.max(this.home / 3, Math.min(this.home * 2000, view.scale * factor));
    const [qx, qy] = this.toMap(x, y);
    view.x += px - qx;
    view.y += py - qy;
    this.moved();
  }

  pan(dx, dy) {
    this.view.x -= dx / this.view.scale;
    this.view.y += dy / this.view.scale;
    this.moved();
  }

  moved() {
    this.fitted = false;
    this.on.hover(-1);
    this.dirty();
  }

  /** Bring a row into view if it is not. */
  reveal(row) {
    const [x, y] = this.toScreen(row);
    const { width, height } = this.view;
    if (x > 40 && y > 60 && x < width - 40 && y < height - 40) return;
    this.view.x = this.points[2 * row];
    this.view.y = this.points[2 * row + 1];
    this.moved();
  }

  toMap(x, y) {
    const { view } = this;
    return [(x - view.width / 2) / view.scale + view.x, (view.height / 2 - y) / view.scale + view.y];
  }

  toScreen(row) {
    const { view } = this;
    const x = this.from[2 * row] + this.t * (this.points[2 * row] - this.from[2 * row]);
    const y = this.from[2 * row + 1] + this.t * (this.points[2 * row + 1] - this.from[2 * row + 1]);
    return [(x - view.x) * view.scale + view.width / 2, view.height / 2 - (y - view.y) * view.scale];
  }

  get t() {
    if (!this.departure) return 1;
    const part = Math.min(1, (performance.now() - this.departure) / FLIGHT);
    return part * part * (3 - 2 * part);
  }

  /** The shown point nearest to a place on the screen, or -1. */
  nearest(x, y, reach = REACH) {
    if (!this.grid || !this.styles) return -1;
    const [cx, cy] = this.toMap(x, y);
    const r = reach / this.view.scale;
    let best = -1, least = r * r;
    this.grid.each(cx - r, cy - r, cx + r, cy + r, (row) => {
      const d = (this.points[2 * row] - cx) ** 2 + (this.points[2 * row + 1] - cy) ** 2;
      if (d < least && this.live(row)) [best, least] = [row, d];
    });
    return best;
  }

  /** What is at a place: a thumbnail that is drawn there, else the nearest point. */
  at(x, y) {
    const tile = (this.tiles || []).find((t) =>
      Math.abs(t.x - x) < TILE / 2 && Math.abs(t.y - y) < TILE / 2 && this.live(t.row));
    return tile ? tile.row : this.nearest(x, y);
  }

  /** Rows of the shown points inside a polygon of [x, y] on the screen, in their order. */
  inside(path) {
    const polygon = path.map(([x, y]) => this.toMap(x, y));
    const xs = polygon.map((p) => p[0]), ys = polygon.map((p) => p[1]);
    const [left, right, bottom, top] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const rows = [];
    this.grid.each(left, bottom, right, top, (row) => {
      const x = this.points[2 * row], y = this.points[2 * row + 1];
      if (x < left || x > right || y < bottom || y > top || !this.live(row)) return;
      let odd = false;
      for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
        const [xi, yi] = polygon[i], [xj, yj] = polygon[j];
        if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) odd = !odd;
      }
      if (odd) rows.push(row);
    });
    return Uint32Array.from(rows).sort();
  }

  // --- input

  listen() {
    const target = this.overlay;
    const place = (event) => [event.offsetX, event.offsetY];
    target.addEventListener("pointerdown", (event) => this.down(event, ...place(event)));
    target.addEventListener("pointermove", (event) => this.move(event, ...place(event)));
    target.addEventListener("pointerup", (event) => this.up(event, ...place(event)));
    target.addEventListener("pointercancel", (event) => this.up(event, NaN, NaN));
    target.addEventListener("pointerleave", () => this.on.hover((this.hovered = -1)));
    target.addEventListener("dblclick", (event) => this.zoom(2, ...place(event)));
    target.addEventListener("wheel", (event) => {
      event.preventDefault();
      const pixels = event.deltaY * (event.deltaMode === 1 ? 16 : 1);
      this.zoom(Math.exp(-Math.max(-240, Math.min(240, pixels)) * (event.ctrlKey ? 0.01 : 0.002)), ...place(event));
    }, { passive: false });
    target.addEventListener("keydown", (event) => this.key(event));
  }

  down(event, x, y) {
    if (event.button !== 0) return;
    this.overlay.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [x, y]);
    this.pressed = [x, y];
    if (this.pointers.size === 1 && (this.mode !== "pan" || event.shiftKey)) {
      this.path = [[x, y]];
      this.boxed = this.mode === "box";
    } else {
      this.path = null;
    }
  }

  move(event, x, y) {
    const last = this.pointers.get(event.pointerId);
    if (!last) {
      if (event.pointerType !== "touch") this.hover(x, y);
      return;
    }
    if (this.pointers.size === 2) {
      const other = [...this.pointers].find(([id]) => id !== event.pointerId)[1];
      const factor = Math.hypot(x - other[0], y - other[1]) / Math.max(1, Math.hypot(last[0] - other[0], last[1] - other[1]));
      this.zoom(factor, (x + other[0]) / 2, (y + other[1]) / 2);
    } else if (this.path) {
      const tip = this.path[this.path.length - 1];
      if (this.boxed) this.path = [this.pressed, [x, this.pressed[1]], [x, y], [this.pressed[0], y]];
      else if (Math.hypot(x - tip[0], y - tip[1]) > 3) this.path.push([x, y]);
      this.dirty();
    } else {
      this.overlay.classList.add("dragging");
      this.pan(x - last[0], y - last[1]);
    }
    this.pointers.set(event.pointerId, [x, y]);
  }

  up(event, x, y) {
    if (!this.pointers.delete(event.pointerId)) return;
    this.overlay.classList.remove("dragging");
    const path = this.path;
    this.path = null;
    this.dirty();
    if (Math.hypot(x - this.pressed[0], y - this.pressed[1]) <= CLICK && (!path || path.length < 3)) {
      const row = this.at(x, y);
      if (row >= 0) this.on.pick(row);
    } else if (path && path.length > 2) {
      this.on.select(this.inside(path), event.shiftKey && this.mode !== "pan");
    }
  }

  hover(x, y) {
    const row = this.at(x, y);
    this.overlay.classList.toggle("over", row >= 0);
    if (row !== this.hovered) this.on.hover((this.hovered = row), x, y);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { width, height } = this.view;
    const actions = {
      ArrowLeft: () => this.pan(width / 8, 0), ArrowRight: () => this.pan(-width / 8, 0),
      ArrowUp: () => this.pan(0, height / 8), ArrowDown: () => this.pan(0, -height / 8),
      "+": () => this.zoom(1.5), "=": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5), 0: () => this.fit(),
      v: () => this.setMode("pan"), l: () => this.setMode("lasso"), b: () => this.setMode("box"),
      Enter: () => {
        const row = this.nearest(width / 2, height / 2, Math.hypot(width, height) / 2);
        if (row >= 0) this.on.pick(row);
      },
      Escape: () => { this.path = null; this.dirty(); },
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  // --- drawing

  dirty() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (!this.points || !this.styles) return;
      const started = performance.now();
      this.draw();
      this.lastFrame = performance.now() - started;
      if (this.departure && this.t < 1) this.dirty();
      else this.departure = null;
    });
  }

  draw() {
    const { view } = this;
    const room = Math.sqrt((view.width * view.height) / (this.points.length / 2));
    view.size = Math.max(2, Math.min(14, Math.max(2, Math.min(7, 0.42 * room)) * (view.scale / this.home) ** 0.35));
    this.renderer.draw(view, this.t);
    const context = this.overlay.getContext("2d");
    context.setTransform(view.ratio, 0, 0, view.ratio, 0, 0);
    context.clearRect(0, 0, view.width, view.height);
    const ink = getComputedStyle(this.section);
    this.drawPictures(context);
    this.drawMarks(context, ink);
    if (this.path && this.path.length > 1) {
      context.beginPath();
      this.path.forEach(([x, y]) => context.lineTo(x, y));
      context.closePath();
      context.strokeStyle = context.fillStyle = ink.getPropertyValue("--accent");
      context.lineWidth = 1.5;
      context.stroke();
      context.globalAlpha = 0.1;
      context.fill();
      context.globalAlpha = 1;
    }
  }

  drawPictures(context) {
    this.tiles = [];
    if (!this.imageOf || this.t < 1) return;
    const [left, top] = this.toMap(0, 0), [right, bottom] = this.toMap(this.view.width, this.view.height);
    const rows = [];
    this.grid.each(left, bottom, right, top, (row) => {
      const x = this.points[2 * row], y = this.points[2 * row + 1];
      if (x >= left && x <= right && y >= bottom && y <= top && this.live(row)) rows.push(row);
      return rows.length <= PICTURES;
    });
    if (rows.length > PICTURES) return;
    const taken = new Set(), half = TILE / 2;
    const marked = new Set([this.marks.query, ...this.marks.near]); // these have the first right to be seen
    rows.sort((a, b) => marked.has(b) - marked.has(a) || a - b);
    for (const row of rows) {
      const [x, y] = this.toScreen(row);
      // No two within a tile of each other, so that none covers another.
      const cell = [Math.round(x / half), Math.round(y / half)];
      let free = true;
      for (let i = -2; i <= 2 && free; i++) for (let j = -2; j <= 2; j++) if (taken.has(`${cell[0] + i},${cell[1] + j}`)) { free = false; break; }
      if (!free) continue;
      taken.add(`${cell[0]},${cell[1]}`);
      const image = this.image(row);
      if (!image.complete || !image.naturalWidth) continue;
      this.tiles.push({ row, x, y });
      const side = Math.min(image.naturalWidth, image.naturalHeight);
      context.imageSmoothingEnabled = side > 64;
      context.drawImage(image, (image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2, side, side, x - half, y - half, TILE, TILE);
      const [r, g, b] = this.colours[this.styles[row]];
      context.strokeStyle = `rgb(${r} ${g} ${b})`;
      context.lineWidth = 2;
      context.strokeRect(x - half, y - half, TILE, TILE);
    }
  }

  image(row) {
    if (!this.images.has(row)) {
      if (this.images.size > 2 * PICTURES) this.images.clear();
      const image = new Image();
      image.onload = () => this.dirty();
      image.src = this.imageOf(row);
      this.images.set(row, image);
    }
    return this.images.get(row);
  }

  drawMarks(context, ink) {
    const { query, near, far, selected } = this.marks;
    const accent = ink.getPropertyValue("--accent"), other = ink.getPropertyValue("--other");
    const text = ink.getPropertyValue("--text");
    const tiled = new Set(this.tiles.map((tile) => tile.row));
    const ring = (row, radius, colour, width) => {
      const [x, y] = this.toScreen(row);
      if (x < -20 || y < -20 || x > this.view.width + 20 || y > this.view.height + 20) return;
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.beginPath();
      if (tiled.has(row)) context.rect(x - TILE / 2 - 2, y - TILE / 2 - 2, TILE + 4, TILE + 4);
      else context.arc(x, y, radius, 0, 7);
      context.stroke();
    };
    const radius = this.view.size / 2 + 1.5;
    context.globalAlpha = selected.length > 200 ? 0.4 : 0.9; // many rings would hide the colours
    for (let i = 0; i < Math.min(selected.length, 20000); i++) ring(selected[i], radius - 0.5, text, 1);
    context.globalAlpha = 1;
    const links = [[far, other], [near, accent]];
    for (const [rows, colour] of links) {
      if (query >= 0) {
        context.globalAlpha = 0.35;
        context.strokeStyle = colour;
        context.lineWidth = 1;
        context.beginPath();
        for (const row of rows) {
          context.moveTo(...this.toScreen(query));
          context.lineTo(...this.toScreen(row));
        }
        context.stroke();
        context.globalAlpha = 1;
      }
    }
    for (const row of far) ring(row, radius + 3.5, other, 2);
    for (const row of near) ring(row, radius + 1, accent, 2);
    if (query >= 0) {
      ring(query, radius + 5, ink.getPropertyValue("--sheet"), 5);
      ring(query, radius + 5, accent, 3);
    }
  }
}
