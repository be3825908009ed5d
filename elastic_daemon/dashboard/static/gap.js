// How long clients were without a token when the group changed: from the daemon's metrics, where they have it.

const NAME = "elastic_client_gap_seconds";

// The share of requests and the bucket that holds it: `{ atMost, count }`, null where nothing was measured yet, and
// undefined where the daemon does not measure it at all.
export function clientGap(text, share = 0.99) {
  const buckets = [];
  for (const [, le, count] of text.matchAll(new RegExp(`^${NAME}_bucket\\{le="([^"]+)"\\} (\\S+)`, "gm"))) {
    buckets.push([le === "+Inf" ? Infinity : Number(le), Number(count)]);
  }
  if (!buckets.length) return undefined;
  const count = buckets.at(-1)[1];
  if (!count) return null;
  return { atMost: buckets.find(([, below]) => below >= share * count)[0], count };
}
