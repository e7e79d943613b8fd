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

// update makes children those of parent, and changes only what differs: what is
// the same stays in the document, with its focus, its selection and a click that
// has begun. Children with a data-id stay the same elements wherever they move.
export function update(parent, children) {
  const focused = parent.contains(document.activeElement) ? document.activeElement : null;
  const wanted = new Set(children.map((c) => c.dataset?.id));
  const known = new Map();
  for (const c of [...parent.children]) {
    if (c.dataset.id === undefined) continue;
    if (wanted.has(c.dataset.id)) known.set(c.dataset.id, c);
    else c.remove();
  }
  let at = parent.firstChild;
  for (const child of children) {
    const id = child.dataset?.id;
    const was = id !== undefined ? known.get(id) : at?.dataset?.id === undefined ? at : null;
    if (!was) parent.insertBefore(child, at);
    else if (was.nodeName !== child.nodeName) {
      if (was === at) at = at.nextSibling;
      was.replaceWith(child);
    } else {
      if (was === at) at = at.nextSibling;
      else parent.insertBefore(was, at);
      become(was, child);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
  if (focused?.isConnected && focused !== document.activeElement) focused.focus({ preventScroll: true });
}

// become makes a node like another one of the same name.
function become(was, now) {
  if (was.nodeType === Node.TEXT_NODE) {
    if (was.data !== now.data) was.data = now.data;
    return;
  }
  for (const { name } of [...was.attributes]) if (!now.hasAttribute(name)) was.removeAttribute(name);
  for (const { name, value } of now.attributes) {
    // The page's policy forbids the attribute style, but not the property.
    if (name === "style") was.style.cssText = now.style.cssText;
    else if (was.getAttribute(name) !== value) was.setAttribute(name, value);
  }
  update(was, [...now.childNodes]);
}

// edge returns the path along points, without the parts where values are 0.
export function edge(points, values) {
  let path = "";
  let drawn = false;
  points.forEach((p, i) => {
    const draw = values[i] > 0 || values[i - 1] > 0 || values[i + 1] > 0;
    if (draw) path += (drawn ? "L" : "M") + p;
    drawn = draw;
  });
  return path;
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

// period formats a number of seconds, long ones in days and hours.
export function period(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return s + " s";
  if (s < 3600) return Math.floor(s / 60) + " min" + (s % 60 ? " " + (s % 60) + " s" : "");
  if (s < 172800) return Math.floor(s / 3600) + " h" + (s % 3600 >= 60 ? " " + Math.floor((s % 3600) / 60) + " min" : "");
  return Math.floor(s / 86400) + " days" + (s % 86400 >= 3600 ? " " + Math.floor((s % 86400) / 3600) + " h" : "");
}

// wait is period for a time to wait, which it rounds up: less would be too short.
export function wait(seconds) {
  const unit = seconds < 3600 ? 1 : seconds < 172800 ? 60 : 3600;
  return period(Math.ceil(seconds / unit) * unit);
}

// clock formats an instant as a time of day.
export const clock = (at) => new Date(at).toLocaleTimeString([], { hour12: false });

// instant returns an element that shows the time of day of an instant.
export const instant = (at) => make("time", { datetime: at, title: at }, clock(at));

// count says how many there are of something.
export const count = (n, one, many) => total(n) + " " + (n === 1 ? one : many);
