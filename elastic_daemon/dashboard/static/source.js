// What the daemon says: requests with the key, and the stream of events. The key is nowhere but in this module.

let key = "";

export const setKey = (given) => {
  key = given.trim();
};
export const hasKey = () => key !== "";

const TIMEOUT_MS = 10000;

function headers(more = {}, given = key) {
  return given ? { ...more, Authorization: `Bearer ${given}` } : more;
}

export class Refused extends Error {
  constructor(status, message, body) {
    super(message);
    this.status = status;
    this.body = body;
  }

  get wantsKey() {
    return this.status === 401 || (this.status === 403 && /key/.test(this.message));
  }
}

// Relative to the page, so that a proxy may put it under another path.
const address = (path) => new URL(path, new URL(".", document.baseURI));

async function answer(response) {
  const body = await response.json().catch(() => null);
  if (body === null) throw new Refused(response.status, `${response.status} without a readable body`, null);
  return body;
}

export async function get(path, accept = [200]) {
  const response = await fetch(address(path), {
    headers: headers(),
    cache: "no-store",
    credentials: "omit",
    signal: AbortSignal.timeout(TIMEOUT_MS),
  });
  const body = await answer(response);
  if (!accept.includes(response.status)) throw refusal(response.status, body);
  return body;
}

// A JSON body and its content type: what the daemon asks of all orders, and what no foreign page can send. A key that is
// given with the order is remembered once it has opened the door.
export async function order(path, body, given = "") {
  const used = given.trim() || key;
  const response = await fetch(address(path), {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }, used),
    body: JSON.stringify(body),
    credentials: "omit",
    signal: AbortSignal.timeout(TIMEOUT_MS),
  });
  const said = await answer(response);
  if (response.status !== 401 && response.status !== 403) key = used;
  if (!response.ok) throw refusal(response.status, said);
  return said;
}

const refusal = (status, body) => new Refused(status, body?.error?.message ?? `the daemon answered ${status}`, body);

// Server-sent events over fetch: EventSource cannot send a key. Calls `hear(event)` for each, `live(true)` once it
// stands; ends when the connection does.
export async function follow(last, hear, live, signal) {
  const response = await fetch(address("events?since=" + last), {
    headers: headers({ Accept: "text/event-stream", "Last-Event-ID": String(last) }),
    cache: "no-store",
    credentials: "omit",
    signal,
  });
  if (!response.ok || !(response.headers.get("content-type") ?? "").startsWith("text/event-stream")) {
    await response.body?.cancel();
    throw new Refused(response.status, "no stream of events", null);
  }
  live(true);
  let text = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const data = block
        .split(/\r?\n/)
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart())
        .join("\n");
      if (data) hear(JSON.parse(data));
    }
  }
}
