// Epochs as a line of how many ranks served, and recoveries with their phases.

import { byId, clock, duration, el, icon, keyed, list, plural, setText, svg } from "./dom.js";

const PHASES = ["detect", "fence", "regroup", "repair", "resume"];
const SHAPES = { start: "start", shrink: "down", grow: "up", regroup: "diamond" };
const FEW = 5;
const HEIGHT = 84;

let all = false;

byId("more").addEventListener("click", () => {
  all = !all;
  setText(byId("more"), all ? "Show the latest" : "Show all");
  if (shown) showRecoveries(shown);
});

let shown = null;

export function showRecoveries(recoveries) {
  shown = recoveries;
  byId("more").hidden = recoveries.length <= FEW;
  const latest = [...recoveries].reverse();
  keyed(byId("recoveries"), all ? latest : latest.slice(0, FEW), (row) => `${row.epoch}-${row.ended}`, make, () => {});
}

function make(row) {
  const phases = PHASES.filter((phase) => row.seconds[phase] > 0);
  const total = row.seconds.total || 1;
  const bar = el("div", { class: "phases", "aria-hidden": "true" }, ...phases.map((phase) => el("i", { class: `phase ${phase}` })));
  phases.forEach((phase, at) => {
    bar.children[at].style.flexGrow = String(Math.max(row.seconds[phase] / total, 0.004));
  });
  return el(
    "li",
    { class: "recovery" },
    el(
      "h3",
      {},
      icon(SHAPES[row.kind] ?? "diamond"),
      el("span", {}, `Epoch ${row.epoch}: ${row.kind}`),
      el("span", { class: "quiet" }, change(row)),
      el("time", { datetime: row.ended }, clock(Date.parse(row.ended))),
    ),
    el("p", { class: "cause" }, row.cause),
    bar,
    el(
      "p",
      { class: "numbers" },
      el("strong", {}, duration(row.seconds.total)),
      ...phases.map((phase) => el("span", {}, el("i", { class: `key ${phase}`, "aria-hidden": "true" }), `${phase} ${duration(row.seconds[phase])}`)),
    ),
    el("p", { class: "requests" }, requests(row.requests)),
  );
}

function change({ kind, ranks, active }) {
  const named = `${ranks.length === 1 ? "rank" : "ranks"} ${list(ranks)}`;
  const served = `${plural(active, "rank")} ${active === 1 ? "serves" : "serve"}`;
  if (!ranks.length) return served;
  return kind === "grow" ? `${named} joined, ${served}` : `${named} lost, ${served}`;
}

export function requests(counts) {
  if (!counts) return "no front end was there to tell of requests";
  if (!Object.values(counts).some(Boolean)) return "no requests were running";
  return `requests: ${counts.kept} kept, ${counts.replayed} replayed, ${counts.restarted} restarted, ${counts.lost} lost`;
}

// A step line; each recovery is a mark with a shape of its own.
export function drawStrip(recoveries, now) {
  const parent = byId("strip");
  const width = parent.clientWidth;
  if (!recoveries.length || width < 80) return;
  const ends = recoveries.map((row) => Date.parse(row.ended));
  const first = ends[0];
  const span = Math.max(now - first, 1000);
  const most = Math.max(...recoveries.map((row) => row.active), 1);
  const [left, right, top, bottom] = [26, 12, 14, HEIGHT - 22];
  const x = (at) => left + ((at - first) / span) * (width - left - right);
  const y = (count) => bottom - (count / most) * (bottom - top);
  let path = `M${x(first)} ${y(recoveries[0].active)}`;
  recoveries.forEach((row, at) => {
    if (at) path += `H${x(ends[at]).toFixed(1)}V${y(row.active).toFixed(1)}`;
  });
  path += `H${x(now).toFixed(1)}`;
  const last = recoveries.at(-1);
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": `Ranks that served since ${clock(first)}: ${recoveries.map((row) => `epoch ${row.epoch} ${row.active}`).slice(-12).join(", ")}` },
    svg("line", { x1: left, x2: width - right, y1: bottom, y2: bottom, class: "axis" }),
    svg("path", { d: `${path}V${bottom}H${x(first)}Z`, class: "area" }),
    svg("path", { d: path, class: "steps" }),
    text(left - 8, y(most) + 4, String(most), "end"),
    text(left - 8, bottom + 4, "0", "end"),
    text(left, HEIGHT - 5, clock(first), "start"),
    text(width - right, HEIGHT - 5, "now", "end"),
  );
  recoveries.forEach((row, at) => {
    drawing.append(svg("use", { href: `#i-${SHAPES[row.kind] ?? "diamond"}`, x: x(ends[at]) - 5, y: y(row.active) - 5, width: 10, height: 10, class: `mark ${row.kind}` }));
  });
  if (last.epoch > 0) drawing.append(text(Math.min(x(now), width - right), top - 4, `epoch ${last.epoch}`, "end"));
  parent.replaceChildren(drawing);
}

function text(x, y, words, anchor) {
  return svg("text", { x, y, "text-anchor": anchor }, words);
}
