// Experts by ranks, on a canvas: 256 experts on 72 ranks are 18 432 cells. The top row counts copies.

import { byId, plural, setText } from "./dom.js";

const LEFT = 50;
const FONT = "11px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace";

export class HeatMap {
  constructor() {
    this.canvas = byId("map");
    this.placement = null;
    this.cursor = null;
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#move(null));
    this.canvas.addEventListener("blur", () => this.#move(null));
    new ResizeObserver(() => this.draw()).observe(byId("map-scroll"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(placement) {
    this.placement = placement;
    setText(byId("experts-summary"), summary(placement));
    this.canvas.setAttribute("aria-label", `Experts by rank. ${summary(placement)}`);
    if (this.cursor) this.#read();
    this.draw();
  }

  draw() {
    const { placement, canvas } = this;
    if (!placement) return;
    const { experts, ranks } = placement;
    const width = Math.floor(byId("map-scroll").clientWidth);
    const cell = Math.max(3, Math.min(48, Math.floor((width - LEFT) / experts)));
    const row = ranks.length > 24 ? 9 : ranks.length > 12 ? 14 : 20;
    const head = 20;
    const size = { width: LEFT + cell * experts + 1, height: head + 5 + row * ranks.length + 1 };
    this.geometry = { cell, row, head: head + 5 };
    const ratio = window.devicePixelRatio || 1;
    canvas.style.inlineSize = `${size.width}px`;
    canvas.style.blockSize = `${size.height}px`;
    canvas.width = Math.round(size.width * ratio);
    canvas.height = Math.round(size.height * ratio);
    const ink = palette();
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = FONT;
    pen.textBaseline = "middle";
    const gap = cell > 5 ? 1 : 0;
    this.#heads(pen, ink, cell, head, gap);
    const of = placement.layer === null ? placement.layers : 1;
    ranks.forEach((rank, at) => {
      const top = head + 5 + at * row;
      if (row >= 14 || at % 4 === 0) label(pen, ink, String(rank), top + row / 2);
      placement.held[at].forEach((count, expert) => {
        pen.globalAlpha = count ? 0.25 + 0.75 * (count / of) : 1;
        pen.fillStyle = count ? ink.held : ink.empty;
        pen.fillRect(LEFT + expert * cell, top, cell - gap, row - (row > 9 ? 1 : 0));
      });
    });
    pen.globalAlpha = 1;
    this.#frame(pen, ink);
  }

  #heads(pen, ink, cell, head, gap) {
    label(pen, ink, "copies", head / 2);
    this.placement.fewest.forEach((count, expert) => {
      const left = LEFT + expert * cell;
      if (count > 1) {
        pen.fillStyle = ink.quiet;
        if (cell >= 12) {
          pen.textAlign = "center";
          pen.fillText(String(count), left + (cell - gap) / 2, head / 2 + 1);
        } else {
          pen.fillRect(left, head - 5, cell - gap, 4);
        }
        return;
      }
      // One copy: a box. None: a box that is filled and crossed. Readable without colour.
      pen.strokeStyle = pen.fillStyle = count ? ink.warn : ink.bad;
      pen.lineWidth = 1.5;
      if (cell < 12) {
        pen.fillRect(left, count ? head - 12 : 1, cell - gap, count ? 11 : head - 2);
        return;
      }
      if (count) pen.strokeRect(left + 1, 1.5, cell - gap - 2, head - 4);
      else pen.fillRect(left, 1, cell - gap, head - 3);
      pen.fillStyle = count ? ink.warn : ink.paper;
      pen.textAlign = "center";
      pen.fillText(count ? "1" : "×", left + (cell - gap) / 2, head / 2 + 0.5);
    });
    pen.textAlign = "left";
  }

  #frame(pen, ink) {
    if (!this.cursor) return;
    const { cell, row, head } = this.geometry;
    const { expert, at } = this.cursor;
    pen.strokeStyle = ink.text;
    pen.lineWidth = 2;
    pen.strokeRect(LEFT + expert * cell - 0.5, at < 0 ? 0.5 : head + at * row - 0.5, Math.max(cell, 4), at < 0 ? 19 : row);
  }

  #key(event) {
    if (!this.placement) return;
    const { experts, ranks } = this.placement;
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-experts, 0], End: [experts, 0] };
    if (event.key === "Escape") return this.#move(null);
    if (!steps[event.key]) return;
    event.preventDefault();
    const from = this.cursor ?? { expert: -steps[event.key][0], at: -1 - steps[event.key][1] };
    const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
    const [x, y] = steps[event.key];
    this.#move({ expert: clamp(from.expert + x, 0, experts - 1), at: clamp(from.at + y, -1, ranks.length - 1) });
  }

  #point(event) {
    if (!this.placement || !this.geometry) return;
    const box = this.canvas.getBoundingClientRect();
    const { cell, row, head } = this.geometry;
    const expert = Math.floor((event.clientX - box.left - LEFT) / cell);
    const y = event.clientY - box.top;
    const at = y < head ? -1 : Math.floor((y - head) / row);
    const inside = expert >= 0 && expert < this.placement.experts && at < this.placement.ranks.length;
    this.#move(inside ? { expert, at } : null);
  }

  #move(cursor) {
    if (cursor?.expert === this.cursor?.expert && cursor?.at === this.cursor?.at) return;
    this.cursor = cursor;
    this.#read();
    this.draw();
  }

  #read() {
    setText(byId("map-readout"), this.cursor ? read(this.placement, this.cursor) : "");
  }
}

function label(pen, ink, text, middle) {
  pen.fillStyle = ink.quiet;
  pen.textAlign = "right";
  pen.fillText(text, LEFT - 6, middle);
  pen.textAlign = "left";
}

export function read(placement, { expert, at }) {
  const fewest = placement.fewest[expert];
  const where = placement.layer === null ? "in the layer with the fewest" : `in layer ${placement.layer}`;
  const copies = `${plural(fewest, "copy", "copies")} ${where}`;
  if (at < 0 || at >= placement.ranks.length) return `Expert ${expert}: ${copies}`;
  const count = placement.held[at][expert];
  const holds =
    placement.layer === null ? `holds it in ${count} of ${plural(placement.layers, "layer")}` : count ? "holds it" : "does not hold it";
  return `Expert ${expert}, rank ${placement.ranks[at]}: ${holds}; ${copies}`;
}

export function summary(placement) {
  const { copies, layer, layers, experts } = placement;
  const [none = 0, one = 0] = copies;
  const all = copies.reduce((sum, count) => sum + count, 0);
  const scope = layer === null ? `${plural(experts, "expert")} in each of ${plural(layers, "layer")}` : `${plural(experts, "expert")} in layer ${layer}`;
  const host = placement.host_copies ? ` ${plural(placement.host_copies, "has", "have")} another copy in host memory.` : "";
  if (none) return `${scope}: ${none} of ${all} in no rank, ${one} in one rank only.${host}`;
  if (one) return `${scope}: ${one} of ${all} in one rank only, the others in two or more.${host}`;
  const least = copies.findIndex((count) => count > 0);
  return `${scope}: each in at least ${plural(least, "rank")}.${host}`;
}

function palette() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return { text: of("--text"), quiet: of("--quiet"), held: of("--held"), empty: of("--empty"), warn: of("--warn"), bad: of("--bad"), paper: of("--paper") };
}
