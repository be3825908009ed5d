// The row of figures. What became of requests, and how long clients waited, is as the daemon has counted since it started.

import { duration, el, keyed, plural, setText } from "./dom.js";

// The share of gaps and the bucket that holds it, of the histogram in /totals: `{ atMost, count }`, null where nothing
// was measured yet.
export function clientGap(histogram, share = 0.99) {
  if (!histogram?.count) return null;
  const buckets = Object.entries(histogram.buckets).map(([le, count]) => [le === "+Inf" ? Infinity : Number(le), count]);
  buckets.sort(([one], [other]) => one - other);
  return { atMost: buckets.find(([, below]) => below >= share * histogram.count)[0], count: histogram.count };
}

// `totals`: null until they have come.
export function showFigures(parent, { health, recoveries, totals }) {
  const { target, active } = health.data_parallel_size;
  const report = recoveries.filter((row) => row.kind !== "start").at(-1);
  const counted = (...names) => (totals ? String(names.reduce((sum, name) => sum + totals.requests[name], 0)) : "—");
  const gap = clientGap(totals?.client_gap);
  const safety = health.expert_safety;
  const rows = [
    ["Ranks serving", `${active} / ${target}`, active < target ? "warn" : "", "of those wanted"],
    ["May still be lost", health.survivable_losses < 0 ? "too few" : String(health.survivable_losses), health.survivable_losses < 1 ? "warn" : "", safety === null ? "ranks" : safety < 0 ? "ranks; an expert is on disk only" : `ranks; ${safety} without reading the disk`],
    ["In flight", String(health.in_flight), "", "requests, held ones included"],
    ["Kept", counted("kept"), "", "requests, since the daemon started"],
    ["Replayed", counted("replayed", "restarted"), "", "of lost ranks, elsewhere"],
    ["Lost", counted("lost"), totals?.requests.lost ? "bad" : "", "requests, since the daemon started"],
    ["Last pause", report ? duration(report.seconds.total) : "none yet", "", report ? `${report.kind}, until all requests were placed` : "no recovery so far"],
    ["Client gap", gapText(gap), "", gap ? `99 % of ${plural(gap.count, "gap")} between tokens` : "none measured yet"],
  ];
  keyed(
    parent,
    rows,
    ([name]) => name,
    ([name]) => el("div", {}, el("dt", {}, name), el("dd", { class: "figure" }), el("dd", { class: "note" })),
    (node, [, value, tone, note]) => {
      node.dataset.tone = tone;
      setText(node.querySelector(".figure"), value);
      setText(node.querySelector(".note"), note);
    },
  );
}

const gapText = (gap) => (gap ? (gap.atMost === Infinity ? "very long" : `≤ ${duration(gap.atMost)}`) : "—");
