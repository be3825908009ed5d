// Small things that all parts use. Text goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const icon = (name) => svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));

export function setIcon(use, name) {
  if (use.getAttribute("href") !== `#i-${name}`) use.setAttribute("href", `#i-${name}`);
}

// Screen readers speak what changes: what stays the same is not written again.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// One child for each key, made once and updated ever after, so that focus stays where it is.
export function keyed(parent, rows, keyOf, make, update) {
  const old = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  let previous = null;
  for (const row of rows) {
    const key = String(keyOf(row));
    let node = old.get(key);
    if (!node) {
      node = make(row);
      node.dataset.key = key;
    }
    old.delete(key);
    const next = previous ? previous.nextSibling : parent.firstChild;
    if (next !== node) parent.insertBefore(node, next);
    update(node, row);
    previous = node;
  }
  for (const node of old.values()) node.remove();
}

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

export function duration(seconds) {
  if (seconds < 0.9995) return `${seconds * 1000 < 10 ? (seconds * 1000).toFixed(1) : Math.round(seconds * 1000)} ms`;
  if (seconds < 90) return `${seconds < 10 ? seconds.toFixed(2) : seconds.toFixed(1)} s`;
  return ago(seconds);
}

export function ago(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

export const clock = (milliseconds) => new Date(milliseconds).toLocaleTimeString([], { hour12: false });

export const list = (numbers) => numbers.join(", ");
