// The page: asks, listens, shows. An event from the daemon wakes a refresh. With a stream of events and while all is
// well, what no event tells of, such as requests in flight, is asked for every five seconds; else all of it every second.

import { WORDS, advise } from "./advice.js";
import { ago, byId, clock, el, keyed, list, setIcon, setText } from "./dom.js";
import { showFigures } from "./figures.js";
import { HeatMap } from "./heatmap.js";
import { askDeed, askScale } from "./orders.js";
import { follow, get, hasKey, setKey } from "./source.js";
import { showTiles } from "./tiles.js";
import { drawStrip, showRecoveries } from "./timeline.js";

const POLL_MS = 1000;
const CALM_MS = 5000;
const SLOW_MS = 10000;
const WAKE_MS = 60;
const RETRY_MS = 2000;
const EVENTS = 60;

const MOVES = new Set(["regrouping", "recovery_done", "experts_spread", "experts_stored", "rank_left", "rank_excluded", "automation_switched"]);

const world = {
  health: null,
  placement: null, // of all layers
  recoveries: [],
  events: [],
  automation: null,
  totals: null,
  heard: 0, // when the daemon last answered, or its stream brought something, ms
  asked: 0, // since when there is a question without an answer, ms; 0: there is none
  statusSince: Date.now(),
  live: false,
  locked: false,
};
const map = new HeatMap();
let layer = null;
let stream = null;

// --- asking ----------------------------------------------------------------------------------------------------------

async function refresh() {
  world.asked ||= Date.now();
  const health = await get("health", [200, 503]);
  world.asked = 0;
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

async function refreshTotals() {
  if (world.locked) return;
  world.totals = (await quietly("totals")) ?? world.totals;
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
    await Promise.all([refreshTotals(), group ? refreshGroup() : null, world.live ? null : refreshEvents()]);
  } catch {
    groupDue = true; // no answer: it is shown how long that lasts
  }
  running = false;
  show();
  if (world.placement && !performance.getEntriesByName("usable").length) performance.mark("usable");
  if (again) wake(WAKE_MS);
  else if (!document.hidden) wake(isCalm() ? CALM_MS : POLL_MS);
}

// `doing` counts seconds down, so that it would look stuck.
const isCalm = () => world.live && !world.asked && world.health?.status === "ok";

// In seconds. Only a question can be left without an answer: who asks seldom hears seldom.
const silence = () => (world.asked ? (Date.now() - Math.max(world.asked, world.heard)) / 1000 : 0);

function hear(event) {
  world.heard = Date.now();
  if (!take(event)) return;
  if (MOVES.has(event.event)) groupDue = true;
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
  const quiet = silence();
  const said = advise(health, { silence: quiet, automation: world.automation, lasted: (Date.now() - world.statusSince) / 1000 });
  const [word, shape, tone] = WORDS[said.status] ?? [said.status, "dashed", "quiet"];
  byId("state").dataset.tone = tone;
  document.body.classList.toggle("stale", quiet > 3);
  byId("state").dataset.status = said.status;
  setIcon(byId("state-icon"), shape);
  setText(byId("state-word"), word);
  setText(byId("state-text"), said.text);
  setText(byId("state-advice"), said.advice ?? "");
  setText(byId("doing"), health?.doing && said.status !== "silent" ? `Now: ${health.doing}` : "");
  showLink(quiet);
  document.title = `${word}${health?.model ? ` · ${health.model}` : ""} · elastic-daemon`;
  byId("key-button").dataset.set = String(hasKey());
  setText(byId("key-button"), hasKey() ? "Key ✓" : "Key");
  if (!health?.ranks) return;
  setText(byId("model"), `${health.model}, epoch ${health.epoch}`);
  showFigures(byId("figures"), world);
  showTiles(byId("tiles"), health, world.placement, (deed, rank) => askDeed(deed, rank, world));
  const size = byId("scale-size");
  if (document.activeElement !== size && !size.dataset.edited) size.value = String(health.data_parallel_size.target);
  showRecoveries(world.recoveries);
  drawStrip(world.recoveries, Date.now());
  showEvents();
}

function showLink(quiet) {
  const [text, shape] =
    quiet > 3 ? [`no answer for ${ago(quiet)}`, "cross"] : world.live ? ["live", "full"] : world.heard ? ["asking every second", "half"] : ["connecting", "dashed"];
  setText(byId("link-text"), text);
  setIcon(byId("link-icon"), shape);
}

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
setInterval(() => document.hidden || show(), 1000); // ages and silence grow although nobody answers
