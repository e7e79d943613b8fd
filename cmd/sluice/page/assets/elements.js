// Elements of the page, and formats of numbers and times.

// make returns an element with attributes and children. Children that are
// strings become text. A key that begins with "on" adds an event listener.
export function make(name, attributes = {}, ...children) {
  const e = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (key === "class") e.className = value;
    else if (key.startsWith("on")) e.addEventListener(key.slice(2), value);
    else e.setAttribute(key, value === true ? "" : value);
  }
  e.append(...children.filter((c) => c !== undefined && c !== null && c !== ""));
  return e;
}

// shape returns an SVG element.
export function shape(name, attributes, ...children) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  e.append(...children);
  return e;
}

// setText changes the text of an element only if it differs, so that screen
// readers do not read it again.
export function setText(e, text) {
  if (e.textContent !== text) e.textContent = text;
}

// update replaces the children of parent that differ from children, in table
// rows cell by cell. What is the same stays in the document, with its focus, its
// selection and a click that has begun.
export function update(parent, children) {
  const was = parent.children;
  for (let i = 0; i < children.length; i++) {
    if (!was[i]) parent.append(children[i]);
    else if (was[i].tagName === "TR") {
      was[i].className = children[i].className;
      update(was[i], [...children[i].children]);
    } else if (!was[i].isEqualNode(children[i])) {
      const focused = was[i].contains(document.activeElement);
      was[i].replaceWith(children[i]);
      if (focused) children[i].querySelector("button")?.focus({ preventScroll: true });
    }
  }
  while (parent.children.length > children.length) parent.lastElementChild.remove();
}

// Formats of numbers and times.
export const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
export const rate = (n) => (n > 0 && n < 10 ? tenth : n < 10000 ? whole : compact).format(n);
export const total = (n) => (n < 100000 ? whole : compact).format(n);
export const percent = (part, all) =>
  all > 0 ? (part > 0 && part < all / 100 ? "<1" : whole.format((100 * part) / all)) + " %" : "–";

// duration formats a number of seconds.
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.001) return whole.format(seconds * 1e6) + " µs";
  if (seconds < 1) return (seconds < 0.01 ? tenth : whole).format(seconds * 1e3) + " ms";
  return tenth.format(seconds) + " s";
}

// ago says how long before now an instant was.
export function ago(then, now) {
  const s = Math.max(0, Math.round((now - new Date(then)) / 1000));
  if (s < 2) return "now";
  if (s < 120) return s + " s ago";
  if (s < 7200) return Math.round(s / 60) + " min ago";
  return s < 172800 ? Math.round(s / 3600) + " h ago" : Math.round(s / 86400) + " days ago";
}

// clock formats a Unix time as a time of day.
export const clock = (unix) => new Date(unix * 1000).toLocaleTimeString([], { hour12: false });
