// Orders: asked for with a button, confirmed in a dialog that says what they will do, followed until they end.

import { byId, el, list, plural, setText } from "./dom.js";
import { get, order } from "./source.js";

const dialog = byId("confirm");
const input = byId("confirm-key-input");

let wanted = null;
let busy = false;

const WORDS = { drain: "Drain", exclude: "Exclude", release: "Release" };

export function askDeed(deed, rank, world) {
  ask({
    title: `${WORDS[deed]} rank ${rank}?`,
    lines: deedLines(deed, rank, world),
    yes: `${WORDS[deed]} rank ${rank}`,
    path: `ranks/${rank}/${deed}`,
    body: { wait: false },
  });
}

export function askScale(size, world) {
  const { target } = world.health.data_parallel_size;
  ask({
    title: `Serve with ${plural(size, "rank")}?`,
    lines: scaleLines(size, target, world),
    yes: `Scale to ${size}`,
    path: "scale_elastic_ep",
    body: { new_data_parallel_size: size, wait: false },
  });
}

function deedLines(deed, rank, { health, placement }) {
  const row = health.ranks.find((found) => found.rank === rank);
  const at = placement?.ranks.indexOf(rank) ?? -1;
  const sole = at >= 0 ? placement.sole[at] : 0;
  const left = Math.max(-1, health.survivable_losses - 1);
  if (deed === "release") return [`Rank ${rank} may come back: it is started again and joins when it is ready. Nothing pauses until then.`];
  const lines = [
    deed === "drain"
      ? "Its requests and experts move to the other ranks while they serve; then it leaves, and stays out until you release it."
      : `It is given up at once, as if it had died. All requests pause for a moment; its own ${plural(row?.in_flight ?? 0, "request")} go on elsewhere. It stays out until you release it.`,
  ];
  if (deed === "exclude" && sole) lines.push(`${plural(sole, "expert")} of its layers ${sole === 1 ? "is" : "are"} nowhere else in memory and will be read from the checkpoint.`);
  lines.push(left < 0 ? "The others cannot hold every expert: the daemon will refuse, or stop serving." : left === 0 ? "After that no further rank may be lost." : `After that ${plural(left, "more rank")} may be lost.`);
  return lines;
}

function scaleLines(size, target, { health }) {
  if (size === target) return [`${plural(target, "rank")} ${target === 1 ? "is" : "are"} wanted already. Nothing will change.`];
  if (size > target) return [`${plural(size - target, "rank")} will be started and join when ready. The others serve meanwhile.`, "The number is remembered over restarts."];
  const unwell = health.ranks.filter((row) => ["excluded", "suspect"].includes(row.state)).map((row) => row.rank);
  return [
    `${plural(target - size, "rank")} will leave: ${unwell.length ? `first those that are not well (${list(unwell)}), then ` : ""}the highest. Their requests move; none is aborted.`,
    "The number is remembered over restarts.",
  ];
}

function ask(what) {
  wanted = what;
  setText(byId("confirm-title"), what.title);
  byId("confirm-text").replaceChildren(...what.lines.map((line) => el("p", {}, line)));
  setText(byId("confirm-yes"), what.yes);
  setText(byId("confirm-error"), "");
  byId("confirm-key").hidden = true;
  input.value = "";
  dialog.showModal();
  byId("confirm-no").focus();
}

async function go() {
  if (busy || !wanted) return;
  busy = true;
  byId("confirm-yes").disabled = true;
  setText(byId("confirm-error"), "");
  const { path, body, title } = wanted;
  try {
    const said = await order(path, body, input.value);
    dialog.close();
    watch(title.replace(/\?$/, ""), said);
  } catch (error) {
    refused(error);
  } finally {
    busy = false;
    byId("confirm-yes").disabled = false;
  }
}

function refused(error) {
  if (error.wantsKey) {
    byId("confirm-key").hidden = false;
    setText(byId("confirm-error"), `Refused: ${error.message}`);
    input.value = "";
    input.focus();
    return;
  }
  setText(byId("confirm-error"), `Refused: ${error.message ?? error}`);
}

async function watch(title, said) {
  const line = byId("order");
  let report = null;
  line.dataset.tone = "quiet";
  setText(line, `${title}: ${said.message}`);
  for (let misses = 0; misses < 20 && !report?.ended; ) {
    await new Promise((done) => setTimeout(done, 250));
    try {
      report = await get(`operations/${said.operation_id}`);
      const { state, message, phase, seconds } = report;
      line.dataset.tone = report.ended ? (state === "done" ? "good" : "bad") : "quiet";
      setText(line, report.ended ? `${title}: ${state} after ${seconds.toFixed(1)} s${message ? ` (${message})` : ""}` : `${title}: ${phase}…`);
      misses = 0;
    } catch {
      misses += 1;
    }
  }
}

byId("confirm-no").addEventListener("click", () => dialog.close());
byId("confirm-form").addEventListener("submit", (event) => {
  event.preventDefault();
  go();
});
dialog.addEventListener("close", () => {
  input.value = "";
  wanted = null;
});
