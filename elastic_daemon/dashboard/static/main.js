// The page: asks, listens, shows. An event from the daemon wakes a refresh; without a stream it asks every second.

import { WORDS, advise } from "./advice.js";
import { ago, byId, clock, duration, el, keyed, list, plural, setIcon, setText } from "./dom.js";
import { clientGap } from "./gap.js";
import { HeatMap } from "./heatmap.js";
import { askDeed, askScale } from "./orders.js";
import { follow, get, getText, hasKey, setKey } from "./source.js";
import { showTiles } from "./tiles.js";
import { drawStrip, showRecoveries } from "./timeline.js";

const POLL_MS = 1000;
const SLOW_MS = 10000;
const WAKE_MS = 60;
const RETRY_MS = 2000;
const EVENTS = 60;
const GAP_MS = 3000;

const MOVES = new Set(["regrouping", "recovery_done", "experts_spread", "experts_stored", "rank_left", "rank_excluded", "automation_switched"]);

const world = {
  health: null,
  placement: null, // of all layers
  recoveries: [],
  events: [],
  automation: null,
  gap: null,
  heard: 0, // when the daemon last answered, ms
  statusSince: Date.now(),
  live: false,
  locked: false,
};
const map = new HeatMap();
let layer = null;
let stream = null;

// --- asking ----------------------------------------------------------------------------------------------------------

async function refresh() {
  const health = await get("health", [200, 503]);
  if (health.status !== world.health?.status) world.statusSince = Date.now();
  world.health = health;
  world.heard = Date.now();
  world.locked = !health.ranks;
}

async function refreshGroup() {
  if (world.locked) return;
  const [placement, recoveries, automation] = await Promise.all([quietly("placement"), quietly("recoveries"), quietly("automation")]);
  if (recoveries) world.recoveries = recoveries;
  if (automation) world.automation = automation.enabled;
  if (placement) {
    world.placement = placement;
    const slider = byId("layer");
    slider.max = String(placement.layers - 1);
    if (layer !== null && layer >= placement.layers) layer = null;
    const shown = layer === null ? placement : await quietly(`placement?layer=${layer}`);
    if (shown) map.show(shown);
  }
}

async function refreshEvents() {
  if (world.locked) return;
  const newest = await quietly(`events?last=${EVENTS}`);
  if (!newest) return;
  const known = world.events.at(-1);
  const same = newest.find((event) => event.id === known?.id);
  // A daemon that was started again numbers its events anew.
  if (known && (same ? same.time !== known.time : (newest.at(-1)?.id ?? 0) < known.id)) {
    world.events = [];
    groupDue = true;
  }
  for (const event of newest) if (take(event) && known && MOVES.has(event.event)) groupDue = true;
}

// The metrics are long, vLLM's own being among them: asked for when they may have changed, and not at all where the
// daemon does not measure the gap.
async function refreshGap() {
  if (world.gap === undefined) return;
  try {
    world.gap = clientGap(await getText("metrics"));
  } catch {
    // next time
  }
}

async function quietly(path) {
  try {
    return await get(path);
  } catch (error) {
    if (error.wantsKey) world.locked = true;
    return null;
  }
}

function take(event) {
  if (event.id <= (world.events.at(-1)?.id ?? 0)) return false;
  world.events.push(event);
  world.events.splice(0, world.events.length - EVENTS);
  return true;
}

// --- when ------------------------------------------------------------------------------------------------------------

let timer = 0;
let groupDue = true;
let running = false;
let again = false;
let slowAt = 0;

function wake(delay) {
  clearTimeout(timer);
  timer = setTimeout(turn, delay);
}

async function turn() {
  if (running) {
    again = true;
    return;
  }
  running = true;
  again = false;
  try {
    const first = !world.health;
    const group = groupDue || Date.now() > slowAt;
    groupDue = false;
    if (group) slowAt = Date.now() + SLOW_MS;
    await refresh();
    if (first) show();
    await Promise.all([group ? refreshGroup() : null, world.live ? null : refreshEvents()]);
  } catch {
    groupDue = true; // no answer: it is shown how long that lasts
  }
  running = false;
  show();
  if (world.placement && !performance.getEntriesByName("usable").length) performance.mark("usable");
  if (again) wake(WAKE_MS);
  else if (!document.hidden) wake(POLL_MS);
}

function hear(event) {
  if (!take(event)) return;
  if (MOVES.has(event.event)) groupDue = true;
  if (event.event === "recovery_done") setTimeout(refreshGap, GAP_MS);
  wake(WAKE_MS);
}

async function listen() {
  for (;;) {
    stream = new AbortController();
    if (!world.locked && world.health && !document.hidden) {
      try {
        await refreshEvents();
        const last = world.events.at(-1)?.id ?? 0;
        await follow(last, hear, () => { world.live = true; wake(0); }, stream.signal);
      } catch {
        // the next turn asks without it
      }
      world.live = false;
      wake(0);
    }
    await new Promise((done) => setTimeout(done, world.health ? RETRY_MS : 100));
  }
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) return stream?.abort();
  groupDue = true;
  wake(0);
});

// --- showing ---------------------------------------------------------------------------------------------------------

function show() {
  const { health } = world;
  const silence = world.heard ? (Date.now() - world.heard) / 1000 : 0;
  const said = advise(health, { silence, automation: world.automation, lasted: (Date.now() - world.statusSince) / 1000 });
  const [word, shape, tone] = WORDS[said.status] ?? [said.status, "dashed", "quiet"];
  byId("state").dataset.tone = tone;
  document.body.classList.toggle("stale", silence > 3);
  byId("state").dataset.status = said.status;
  setIcon(byId("state-icon"), shape);
  setText(byId("state-word"), word);
  setText(byId("state-text"), said.text);
  setText(byId("state-advice"), said.advice ?? "");
  setText(byId("doing"), health?.doing && said.status !== "silent" ? `Now: ${health.doing}` : "");
  showLink(silence);
  document.title = `${word}${health?.model ? ` · ${health.model}` : ""} · elastic-daemon`;
  byId("key-button").dataset.set = String(hasKey());
  setText(byId("key-button"), hasKey() ? "Key ✓" : "Key");
  if (!health?.ranks) return;
  setText(byId("model"), `${health.model}, epoch ${health.epoch}`);
  showFigures(health);
  showTiles(byId("tiles"), health, world.placement, (deed, rank) => askDeed(deed, rank, world));
  const size = byId("scale-size");
  if (document.activeElement !== size && !size.dataset.edited) size.value = String(health.data_parallel_size.target);
  showRecoveries(world.recoveries);
  drawStrip(world.recoveries, Date.now());
  showEvents();
}

function showLink(silence) {
  const [text, shape] =
    silence > 3 ? [`no answer for ${ago(silence)}`, "cross"] : world.live ? ["live", "full"] : world.heard ? ["asking every second", "half"] : ["connecting", "dashed"];
  setText(byId("link-text"), text);
  setIcon(byId("link-icon"), shape);
}

function showFigures(health) {
  const { target, active } = health.data_parallel_size;
  const report = world.recoveries.filter((row) => row.kind !== "start").at(-1);
  const sum = (name) => world.recoveries.reduce((total, row) => total + (row.requests?.[name] ?? 0), 0);
  const safety = health.expert_safety;
  const rows = [
    ["Ranks serving", `${active} / ${target}`, active < target ? "warn" : "", "of those wanted"],
    ["May still be lost", health.survivable_losses < 0 ? "too few" : String(health.survivable_losses), health.survivable_losses < 1 ? "warn" : "", safety === null ? "ranks" : safety < 0 ? "ranks; an expert is on disk only" : `ranks; ${safety} without reading the disk`],
    ["In flight", String(health.in_flight), "", "requests, held ones included"],
    ["Kept", String(sum("kept")), "", "requests, in all recoveries"],
    ["Replayed", String(sum("replayed") + sum("restarted")), "", "of lost ranks, elsewhere"],
    ["Lost", String(sum("lost")), sum("lost") ? "bad" : "", "requests, in all recoveries"],
    ["Last pause", report ? duration(report.seconds.total) : "none yet", "", report ? `${report.kind}, until all requests were placed` : "no recovery so far"],
    ["Client gap", gapText(world.gap), "", world.gap ? `99 % of ${plural(world.gap.count, "gap")} between tokens` : world.gap === null ? "none measured yet" : "not measured here"],
  ];
  keyed(
    byId("figures"),
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

const words = (value) => (Array.isArray(value) ? list(value.map(words)) : value !== null && typeof value === "object" ? Object.entries(value).map(([name, inner]) => `${name} ${words(inner)}`).join(" ") : String(value));

function showEvents() {
  const latest = [...world.events].reverse();
  keyed(
    byId("events"),
    latest,
    (event) => `${event.id}-${event.time}`,
    ({ id, time, event, ...fields }) =>
      el(
        "li",
        {},
        el("time", { datetime: new Date(time * 1000).toISOString() }, clock(time * 1000)),
        el("span", { class: "what mono" }, event),
        el("span", { class: "fields" }, Object.entries(fields).filter(([, value]) => value !== null && value !== "").map(([name, value]) => `${name} ${words(value)}`).join(" · ")),
      ),
    () => {},
  );
}

// --- acting ----------------------------------------------------------------------------------------------------------

byId("scale-size").addEventListener("input", (event) => { event.target.dataset.edited = "yes"; });
byId("scale-size").addEventListener("keydown", (event) => { if (event.key === "Enter") byId("scale-button").click(); });
byId("scale-button").addEventListener("click", () => {
  const size = byId("scale-size");
  if (!world.health?.ranks) return;
  if (!size.reportValidity() || size.value === "") return;
  askScale(Number(size.value), world);
  delete size.dataset.edited;
});

byId("layer").addEventListener("input", async (event) => {
  const value = Number(event.target.value);
  layer = value < 0 ? null : value;
  setText(byId("layer-text"), layer === null ? "all" : String(layer));
  event.target.setAttribute("aria-valuetext", layer === null ? "all layers" : `layer ${layer}`);
  const asked = layer;
  const shown = layer === null ? world.placement : await quietly(`placement?layer=${layer}`);
  if (shown && asked === layer) map.show(shown);
});

const keys = byId("keys");
byId("key-button").addEventListener("click", () => { byId("keys-input").value = ""; keys.showModal(); byId("keys-input").focus(); });
byId("keys-no").addEventListener("click", () => keys.close());
function useKey() {
  setKey(byId("keys-input").value);
  byId("keys-input").value = "";
  keys.close();
  world.locked = false;
  groupDue = true;
  stream?.abort();
  wake(0);
}
byId("keys-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey();
});

new ResizeObserver(() => drawStrip(world.recoveries, Date.now())).observe(byId("strip"));

turn();
listen();
setTimeout(refreshGap, GAP_MS);
setInterval(() => document.hidden || show(), 1000); // ages and silence grow although nobody answers
