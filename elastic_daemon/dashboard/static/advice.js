// From /health to what a person who was just woken needs: what is going on, and what to do. No DOM in here.

import { ago, list, plural } from "./dom.js";

const COMING = ["starting", "standby", "joining"];

export const WORDS = {
  ok: ["OK", "full", "good"],
  degraded: ["Degraded", "warn", "warn"],
  recovering: ["Recovering", "half", "warn"],
  unavailable: ["Unavailable", "cross", "bad"],
  starting: ["Starting", "dashed", "quiet"],
  stopping: ["Stopping", "dash", "quiet"],
  silent: ["No answer", "cross", "bad"],
};

const sentence = (text) => (text ? text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".") : "");
const named = (ranks) => `${ranks.length === 1 ? "rank" : "ranks"} ${list(ranks)}`;

// `silence`: seconds since the daemon last answered; `automation`: whether it acts by itself, null if not known;
// `lasted`: seconds in this status.
export function advise(health, { silence = 0, automation = null, lasted = 0 } = {}) {
  if (silence > 3 || !health) {
    return {
      status: "silent",
      text: health ? `The daemon has not answered for ${ago(silence)}. What is below is what it said last.` : "The daemon does not answer.",
      advice: "See whether it runs: systemctl status elastic-daemon, then its log.",
    };
  }
  const { status } = health;
  if (!health.ranks) {
    return { status, text: "The daemon tells strangers no more than this.", advice: "Give an API key or the admin key to see the rest: the Key button." };
  }
  const { target, active } = health.data_parallel_size;
  const reason = health.reason ?? "";
  const says = {
    ok: () => ({ text: `${target === 1 ? "The rank serves" : `All ${target} ranks serve`}.${reason ? ` ${sentence(reason)}` : ""}`, advice: fine(health, reason, automation) }),
    degraded: () => ({ text: `${active} of ${target} ranks serve, and no request is refused. ${sentence(reason)}`, advice: degraded(health, reason, automation) }),
    recovering: () => ({
      text: `Requests are held while the ranks regroup; none fails. ${sentence(reason)}`,
      advice: lasted > 10 ? `This has lasted ${ago(lasted)}, which is too long: see below what it waits for.` : "Wait: this takes about a second.",
    }),
    unavailable: () => ({
      text: `Nothing is served. ${sentence(reason)}`,
      advice: missing(health).coming.length
        ? `${sentence(named(missing(health).coming))} ${missing(health).coming.length === 1 ? "is" : "are"} starting: wait.`.replace(". ", " ")
        : "Bring ranks back: release those that are excluded, or free a GPU. Requests are held, then answered with 503.",
    }),
    starting: () => ({ text: sentence(reason || "ranks are starting"), advice: "Wait until the ranks have loaded the model." }),
    stopping: () => ({ text: `No new requests are taken. ${sentence(reason)}`, advice: "Running requests may finish, then the daemon ends." }),
  };
  return { status, ...(says[status] ?? (() => ({ text: sentence(reason), advice: "" })))() };
}

function fine(health, reason, automation) {
  if (automation === false) return "Automation is off: a lost rank would not come back by itself. Switch it on after the maintenance.";
  if (health.expert_safety === -1) return "An expert is in no memory any more: the next recovery reads it from the checkpoint.";
  if (health.survivable_losses === 0) return "The next loss stops the service: add a rank if you can.";
  return reason ? "Nothing is urgent; look into the reason." : "Nothing to do.";
}

function missing(health) {
  const rows = health.ranks.filter((row) => row.state !== "retired");
  return {
    coming: rows.filter((row) => COMING.includes(row.state)).map((row) => row.rank),
    out: rows.filter((row) => row.state === "excluded").map((row) => row.rank),
    leaving: rows.filter((row) => row.state === "draining").map((row) => row.rank),
  };
}

function degraded(health, reason, automation) {
  const { coming, out, leaving } = missing(health);
  const restarting = /restarting ranks|probation of a GPU/.test(health.doing ?? "");
  const parts = [];
  if (automation === false) parts.push("Automation is off: nothing is restored until it is switched on.");
  if (leaving.length) parts.push(`${sentence(named(leaving)).slice(0, -1)} ${leaving.length === 1 ? "is" : "are"} being drained: wait.`);
  if (coming.length) parts.push(`${sentence(named(coming)).slice(0, -1)} ${coming.length === 1 ? "is" : "are"} on the way back: nothing to do.`);
  else if (out.length && /waits for a usable GPU/.test(reason)) parts.push("It waits for a GPU: replace one, or release one from quarantine.");
  else if (out.length && restarting) parts.push(`${sentence(named(out)).slice(0, -1)} ${out.length === 1 ? "comes" : "come"} back by ${out.length === 1 ? "itself" : "themselves"}: nothing to do.`);
  else if (out.length && automation !== false) parts.push(`Release ${named(out)} to start ${out.length === 1 ? "it" : "them"} again, or scale to ${health.data_parallel_size.active} to do without.`);
  if (health.survivable_losses === 0) parts.push("The next loss stops the service.");
  return parts.join(" ");
}
