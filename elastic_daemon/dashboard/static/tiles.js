// The ranks, one tile each.

import { ago, el, icon, keyed, plural, setIcon, setText } from "./dom.js";

const STATES = {
  active: ["full", "good"],
  suspect: ["warn", "warn"],
  draining: ["half", "warn"],
  joining: ["plus", "quiet"],
  standby: ["ring", "quiet"],
  starting: ["dashed", "quiet"],
  excluded: ["cross", "bad"],
  retired: ["dash", "quiet"],
};

const DEEDS = {
  active: ["drain", "exclude"],
  suspect: ["drain", "exclude"],
  draining: ["exclude"],
  excluded: ["release"],
};

const DENSE = 16; // more ranks than this: small tiles

const LABELS = { drain: "Drain…", exclude: "Exclude…", release: "Release…" };

export const shortGpu = (gpu) => (gpu ? (gpu.length > 12 ? `${gpu.slice(0, 4)}…${gpu.slice(-4)}` : gpu) : "—");

// `placement`: of all layers, or null. `give(deed, rank)`: an order is wanted.
export function showTiles(parent, health, placement, give) {
  const rows = health.ranks ?? [];
  parent.classList.toggle("dense", rows.length > DENSE);
  const most = Math.max(1, ...rows.map((row) => row.in_flight));
  const held = new Map((placement?.ranks ?? []).map((rank, at) => [rank, at]));
  keyed(
    parent,
    rows,
    (row) => row.rank,
    (row) => make(row.rank, give),
    (tile, row) => update(tile, row, most, placement, held.get(row.rank)),
  );
}

function make(rank, give) {
  const tile = el(
    "li",
    { class: "tile", "aria-labelledby": `rank-${rank}` },
    el(
      "h3",
      { id: `rank-${rank}` },
      el("span", { class: "name" }, `Rank ${rank}`),
      el("span", { class: "is" }, icon("dashed"), " ", el("span", { class: "state-name" })),
    ),
    el("p", { class: "why" }),
    el(
      "dl",
      {},
      el("div", { class: "load-row" }, el("dt", {}, "Requests"), el("dd", { class: "load" }, el("span", { class: "count" }), el("span", { class: "bar", "aria-hidden": "true" }, el("i")))),
      el("div", {}, el("dt", {}, "Experts"), el("dd", { class: "experts" })),
      el("div", { class: "gpu-row" }, el("dt", {}, "GPU"), el("dd", { class: "gpu mono" })),
      el("div", {}, el("dt", {}, "Process"), el("dd", { class: "pid mono" })),
    ),
    el("div", { class: "deeds" }),
  );
  tile.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-deed]");
    if (button) give(button.dataset.deed, rank, button);
  });
  return tile;
}

function update(tile, row, most, placement, at) {
  const [shape, tone] = STATES[row.state] ?? ["dashed", "quiet"];
  const part = (selector) => tile.querySelector(selector);
  tile.dataset.tone = tone;
  tile.dataset.state = row.state;
  setIcon(part(".is use"), shape);
  setText(part(".state-name"), row.state);
  const why = part(".why");
  setText(why, row.reason ?? "");
  why.hidden = !row.reason;
  setText(part(".count"), String(row.in_flight));
  part(".bar i").style.inlineSize = `${(100 * row.in_flight) / most}%`;
  setText(part(".experts"), experts(placement, at));
  part(".experts").classList.toggle("alone", Boolean(placement && at !== undefined && placement.sole[at]));
  const gpu = part(".gpu");
  setText(gpu, shortGpu(row.gpu));
  gpu.title = row.gpu ?? "";
  part(".gpu-row").hidden = !row.gpu; // a small tile has no room to say what is not known
  const since = Math.max(0, (Date.now() - Date.parse(row.since)) / 1000);
  setText(part(".pid"), `${row.pids.length ? row.pids.join(", ") : "none"} · ${ago(since)}`);
  part(".pid").title = `in this state since ${row.since}`;
  buttons(part(".deeds"), row);
}

function experts(placement, at) {
  if (!placement || at === undefined) return "—";
  const held = placement.held[at].reduce((sum, count) => sum + count, 0);
  const per = `${held} in ${plural(placement.layers, "layer")}`;
  return placement.sole[at] ? `${per}, ${placement.sole[at]} nowhere else` : per;
}

function buttons(parent, row) {
  keyed(
    parent,
    DEEDS[row.state] ?? [],
    (deed) => deed,
    (deed) => el("button", { type: "button", "data-deed": deed, "aria-haspopup": "dialog", "aria-label": `${LABELS[deed].slice(0, -1)} rank ${row.rank}` }, LABELS[deed]),
    () => {},
  );
}
