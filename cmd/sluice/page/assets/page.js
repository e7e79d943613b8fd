// The operator's page. While it is visible it requests /api/ once a second. It
// shows what it gets as text and never as markup.

import { ago, clock, duration, make, percent, rate, setText, shape, total, update, whole } from "./elements.js";

const every = 1000; // milliseconds
const sparkLength = 60; // polls
const $ = (id) => document.getElementById(id);

// fetchJSON requests a path of /api/, by POST if there is a form.
async function fetchJSON(path, form) {
  const response = await fetch("api/" + path, form ? { method: "POST", body: form } : undefined);
  const answer = await response.json().catch(() => ({ error: response.statusText }));
  if (!response.ok) throw new Error(answer.error ?? response.statusText);
  return answer;
}

// The large chart: stacked areas, one for each kind.
const kinds = ["passed", "limited", "refused"];
let seconds = [];
let cursor = null; // an index of seconds; null is the newest

// niceTop returns the top of a scale that has room for n.
function niceTop(n) {
  const unit = 10 ** Math.floor(Math.log10(Math.max(n, 1)));
  return [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((m) => m * unit >= n) * unit;
}

// drawTraffic draws the large chart with its scale and legend.
function drawTraffic() {
  const most = 300;
  const top = niceTop(Math.max(1, ...seconds.map((s) => s.passed + s.limited + s.refused)));
  const x = (i) => most - seconds.length + i;
  const svg = shape("svg", { viewBox: `0 0 ${most - 1} 100`, preserveAspectRatio: "none", "aria-hidden": "true" });
  for (const y of [0, 50]) svg.append(shape("line", { class: "grid", x1: 0, x2: most - 1, y1: y, y2: y }));
  let floor = seconds.map(() => 0);
  for (const kind of kinds) {
    const roof = seconds.map((s, i) => floor[i] + s[kind]);
    const point = (v, i) => `${x(i)} ${(100 - (100 * v) / top).toFixed(2)}`;
    if (seconds.some((s) => s[kind] > 0)) {
      const edge = roof.map(point);
      svg.append(
        shape("path", {
          class: "area " + kind,
          d: "M" + edge.join("L") + "L" + floor.map(point).reverse().join("L") + "Z",
        }),
        shape("path", { class: "edge " + kind, d: "M" + edge.join("L") }),
      );
    }
    floor = roof;
  }
  svg.append(shape("line", { class: "base", x1: 0, x2: most - 1, y1: 100, y2: 100 }));
  if (cursor !== null && seconds[cursor])
    svg.append(shape("line", { class: "cursor", x1: x(cursor), x2: x(cursor), y1: 0, y2: 100 }));
  $("traffic").replaceChildren(svg);
  update(
    $("traffic-scale"),
    [top, top / 2, 0].map((v, i) => {
      const e = make("span", {}, rate(v));
      e.style.top = i * 50 + "%";
      return e;
    }),
  );
  update(
    $("traffic-times"),
    ["5 min ago", "4", "3", "2", "1", "now"].map((t) => make("span", {}, t)),
  );

  const at = seconds[cursor ?? seconds.length - 1];
  const legend = kinds.map((k) => make("li", { class: k }, k, make("b", {}, at ? rate(at[k]) : "–")));
  if (cursor !== null && at) legend.unshift(make("li", { class: "at" }, clock(at.at)));
  update($("legend"), legend);
}

// moveCursor selects a second of the large chart; null is the newest.
function moveCursor(to) {
  cursor = to === null || seconds.length === 0 ? null : Math.min(Math.max(to, 0), seconds.length - 1);
  drawTraffic();
}
$("traffic").addEventListener("pointermove", (e) => {
  const box = $("traffic").getBoundingClientRect();
  moveCursor(Math.round(((e.clientX - box.left) / box.width) * 299) - 300 + seconds.length);
});
for (const leave of ["pointerleave", "blur"]) $("traffic").addEventListener(leave, () => moveCursor(null));
$("traffic").addEventListener("keydown", (e) => {
  const now = cursor ?? seconds.length - 1;
  const to = {
    ArrowLeft: now - 1,
    ArrowRight: now + 1,
    PageUp: now - 30,
    PageDown: now + 30,
    Home: 0,
    End: seconds.length - 1,
    Escape: null,
  }[e.key];
  if (to === undefined) return;
  e.preventDefault();
  moveCursor(to);
});

// showStatus shows GET /api/status.
function showStatus(s) {
  document.title = `sluice · ${s.domain}`;
  setText($("domain"), s.domain);
  setText($("version"), s.version);
  const [tone, word] = s.draining
    ? ["warn", "Draining"]
    : s.store.breaker_open > 0
      ? ["bad", "Without Redis"]
      : s.ready
        ? ["good", "Ready"]
        : ["warn", "Waiting for Redis"];
  $("state").className = "state " + tone;
  setText($("state"), word);

  const last = seconds.at(-1);
  const all = last ? last.passed + last.limited + last.refused : 0;
  setText($("now-checks"), last ? rate(all) : "–");
  setText($("now-limited"), last ? percent(last.limited, all) : "–");
  for (const [id, q] of [
    ["now", s.check_seconds],
    ["store", s.store.seconds],
  ]) {
    setText($(id + "-p50"), duration(q.p50));
    setText($(id + "-p99"), duration(q.p99));
  }
  const inRedis = s.store.kind === "redis";
  setText($("store-title"), inRedis ? "Redis latency" : "Store latency");

  const alarms = [];
  if (s.config.last_reload?.result === "failure") {
    alarms.push(
      make(
        "div",
        { class: "alarm bad" },
        make("b", {}, "Config reload failed, keeping the previous config."),
        make("pre", {}, s.config.last_reload.mistakes.join("\n")),
      ),
    );
  }
  if (s.store.breaker_open > 0) {
    alarms.push(
      make(
        "div",
        { class: "alarm bad" },
        make("b", {}, "Redis does not answer."),
        " Until it does, on_failure decides.",
      ),
    );
  } else if (s.store.errors_last_minute > 0) {
    alarms.push(
      make(
        "div",
        { class: "alarm warn" },
        make("b", {}, `${total(s.store.errors_last_minute)} Redis errors in the last minute.`),
      ),
    );
  }
  if (s.draining) alarms.push(make("div", { class: "alarm warn" }, make("b", {}, "This sidecar is shutting down.")));
  update($("alarms"), alarms);

  const errors = Object.entries(s.store.errors).filter(([, n]) => n > 0);
  rows("store", [
    ["Where", inRedis ? `Redis, ${s.store.address}` : "in this process"],
    [
      "State",
      !inRedis
        ? "good"
        : s.store.breaker_open > 0
          ? "does not answer"
          : s.store.errors_last_minute > 0
            ? "some errors"
            : "answers",
      s.store.breaker_open > 0 || s.store.errors_last_minute > 0 ? "bad" : "good",
    ],
    [
      "Errors",
      errors.length
        ? errors.map(([kind, n]) => `${kind} ${total(n)}`).join(", ") + " since the start"
        : "none since the start",
    ],
    ["Last minute", `${total(s.store.errors_last_minute)} errors`],
    ["Buckets in process", `${total(s.store.entries)}`],
  ]);
  const reload = s.config.last_reload;
  rows("config", [
    ["File", s.config.file || "none, limits come from Envoy’s routes"],
    ["Hash", make("code", {}, s.config.hash)],
    ["Limits", total(s.config.limits)],
    [
      "Last reload",
      reload
        ? `${reload.result === "failure" ? "rejected" : "in force"}, ${ago(reload.at, new Date(s.now))}`
        : "none since the start",
      reload?.result === "failure" ? "bad" : "",
    ],
    ["Started", ago(s.started, new Date(s.now))],
    ["Log level", s.log_level],
  ]);
}

// rows shows a list of [name, value, tone].
function rows(id, all) {
  update(
    $(id),
    all.flatMap(([name, value, tone]) => [make("dt", {}, name), make("dd", { class: tone || undefined }, value)]),
  );
}

// The limits, with their rates since this page was opened.
const seen = new Map(); // from a limit's name, mode and source to {at, allowed, limited, rates}
let chosen = null; // the name of the limit whose keys are shown

// note records the counts of a limit, and returns what is seen of it.
function note(limit, now) {
  const id = limit.name + " " + limit.mode + " " + limit.from;
  let s = seen.get(id);
  if (!s) seen.set(id, (s = { rates: [] }));
  else {
    const took = (now - s.at) / 1000;
    if (took < 0.2) return s;
    s.rates.push({
      allowed: Math.max(0, limit.allowed - s.allowed) / took,
      limited: Math.max(0, limit.limited - s.limited) / took,
    });
    if (s.rates.length > sparkLength) s.rates.shift();
  }
  Object.assign(s, { at: now, allowed: limit.allowed, limited: limit.limited });
  return s;
}

// spark returns a small chart of rates.
function spark(rates) {
  const svg = shape("svg", {
    viewBox: `0 0 ${sparkLength - 1} 100`,
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  svg.append(shape("line", { class: "grid", x1: 0, x2: sparkLength - 1, y1: 100, y2: 100 }));
  if (rates.length < 2) return svg;
  const top = Math.max(0.001, ...rates.map((r) => r.allowed + r.limited)) * 1.1;
  const x = (i) => sparkLength - rates.length + i;
  const point = (v, i) => `${x(i)} ${(100 - (100 * v) / top).toFixed(1)}`;
  const lower = rates.map((r, i) => point(r.allowed, i));
  const upper = rates.map((r, i) => point(r.allowed + r.limited, i));
  svg.append(shape("path", { class: "area passed", d: `M${x(0)} 100L${lower.join("L")}L${x(rates.length - 1)} 100Z` }));
  if (rates.some((r) => r.limited > 0)) {
    svg.append(
      shape("path", { class: "area limited", d: "M" + upper.join("L") + "L" + lower.toReversed().join("L") + "Z" }),
      shape("path", { class: "edge limited", d: "M" + upper.join("L") }),
    );
  }
  svg.append(shape("path", { class: "edge passed", d: "M" + lower.join("L") }));
  return svg;
}

// showLimits shows GET /api/limits.
function showLimits({ total: count, limits }) {
  const now = performance.now();
  if (!limits.some((l) => l.name === chosen)) chosen = limits[0]?.name ?? null;
  update(
    $("limits-rows"),
    limits.map((l) => {
      const s = note(l, now);
      const last = s.rates.at(-1) ?? { allowed: 0, limited: 0 };
      const tags = [];
      if (l.mode === "shadow") tags.push(" ", make("span", { class: "tag" }, "shadow"));
      if (l.from === "route") tags.push(" ", make("span", { class: "tag" }, "from a route"));
      if (l.group) tags.push(" ", make("span", { class: "tag" }, "group " + l.group));
      const about = [
        l.key.length ? "by " + l.key.join(" · ") : l.from === "config" ? "one bucket for all" : "",
        l.overrides ? `${total(l.overrides)} override${l.overrides > 1 ? "s" : ""}` : "",
      ]
        .filter(Boolean)
        .join(", ");
      return make(
        "tr",
        { class: l.name === chosen ? "chosen" : undefined },
        make(
          "td",
          {},
          make("button", { type: "button", "data-limit": l.name, "aria-pressed": String(l.name === chosen) }, l.name),
          ...tags,
          make("small", { class: "mono" }, about),
        ),
        make(
          "td",
          { class: "rate" },
          l.rate || "–",
          l.burst ? make("small", {}, "burst " + whole.format(l.burst)) : "",
          l.lease ? make("small", {}, "lease " + l.lease) : "",
        ),
        make(
          "td",
          { class: "num", "data-label": "Allowed" },
          make("b", {}, rate(last.allowed) + "/s"),
          make("span", { class: "total" }, total(l.allowed)),
        ),
        make(
          "td",
          {
            class: "num" + (last.limited > 0 && l.mode !== "shadow" ? " hot" : ""),
            "data-label": l.mode === "shadow" ? "Would deny" : "Denied",
            title: l.mode === "shadow" ? "would be denied if the limit were enforced" : undefined,
          },
          make("b", {}, rate(last.limited) + "/s"),
          make("span", { class: "total" }, total(l.limited)),
        ),
        make("td", { class: "spark" }, spark(s.rates)),
      );
    }),
  );
  setText($("limits-note"), count > limits.length ? `${limits.length} of ${total(count)}, those that denied most` : "");
  $("limits-empty").hidden = limits.length > 0;
  setText(
    $("limits-empty"),
    $("filter").value
      ? "No limit has such a name."
      : "No limits. Limits of Envoy’s routes appear with their first request.",
  );
}
$("limits-rows").addEventListener("click", (e) => {
  const name = e.target.closest("[data-limit]")?.dataset.limit;
  if (name === undefined) return;
  chosen = name;
  poll();
});
$("filter").addEventListener("input", () => poll());

// keyOf returns an element that shows a key by its parts. Secret parts are
// hashes.
function keyOf(parts, key) {
  if (!parts?.length)
    return make("span", { class: "key" }, make("span", {}, key === "" ? "–" : key === "-" ? "all" : key));
  return make(
    "span",
    { class: "key" },
    ...parts.map((p) =>
      make(
        "span",
        { class: p.kind, title: p.kind === "hash" ? p.text : undefined },
        p.kind === "hash" ? p.text.slice(0, 10) + "…" : p.text || "empty",
      ),
    ),
  );
}

// showTop shows GET /api/top.
function showTop(top) {
  setText($("top-title"), top ? `Top keys of ${top.limit}` : "Top keys");
  for (const [id, keys, none] of [
    ["top-denials", top?.denials ?? [], "No denials."],
    ["top-requests", top?.requests ?? [], "No requests."],
  ]) {
    const most = Math.max(1, ...keys.map((k) => k.count));
    const bars = keys.slice(0, 8).map((k) => {
      const bar = make("div", { class: "bar" });
      bar.style.width = (100 * k.count) / most + "%";
      return make(
        "li",
        {},
        bar,
        keyOf(k.parts, k.key),
        make(
          "span",
          { class: "count", title: k.over ? `between ${k.count - k.over} and ${k.count}` : undefined },
          k.over ? make("small", {}, total(k.count - k.over) + " to ") : "",
          total(k.count),
        ),
      );
    });
    update($(id), bars.length ? bars : [make("li", { class: "empty" }, none)]);
  }
}

const decisions = {
  limited: "limited",
  failed_closed: "store failed",
  delegated: "left to Envoy",
  invalid: "error in the config",
};

// showDenials shows GET /api/denials.
function showDenials(all, now) {
  update(
    $("denials-rows"),
    all.slice(0, 25).map((d) =>
      make(
        "tr",
        {},
        make("td", { class: "when" }, ago(d.last, now)),
        make("td", { class: "num" }, make("b", {}, total(d.count)), "×"),
        make(
          "td",
          { class: "limit" },
          make("b", {}, d.limit || "–"),
          make("small", {}, decisions[d.decision] ?? d.decision),
        ),
        make("td", { class: "keys" }, keyOf(d.parts, d.key)),
        make(
          "td",
          { class: "why" },
          d.reason,
          d.retry_after !== null ? make("small", {}, `retry in ${d.retry_after} s`) : "",
        ),
        make(
          "td",
          { class: "request mono" },
          `${d.method} ${d.host}${d.path}`,
          make("small", {}, "from " + (d.source || "unknown")),
        ),
        make(
          "td",
          { class: "act" },
          d.explainable
            ? make(
                "button",
                {
                  type: "button",
                  class: "small",
                  "data-denial": d.id,
                  "aria-label": `Explain the latest denial${d.limit ? " by " + d.limit : ""}`,
                },
                "Explain",
              )
            : "",
        ),
      ),
    ),
  );
  $("denials-empty").hidden = all.length > 0;
}
$("denials-rows").addEventListener("click", (e) => {
  const id = e.target.closest("[data-denial]")?.dataset.denial;
  if (id === undefined) return;
  explain(new URLSearchParams({ denial: id }));
});

// Explain.
$("form").addEventListener("submit", (e) => {
  e.preventDefault();
  const form = new URLSearchParams();
  for (const [name, value] of new FormData($("form"))) {
    const lines = e.target.elements[name].tagName === "TEXTAREA" ? value.split("\n") : [value];
    for (const line of lines) if (line.trim() !== "") form.append(name, line.trim());
  }
  explain(form);
});

// explain requests and shows an explanation. form has the request.
async function explain(form) {
  const answer = $("answer");
  try {
    showExplanation(await fetchJSON("explain", form), form.get("denial"));
  } catch (e) {
    answer.replaceChildren(make("p", { class: "error" }, e.message));
  }
  answer.focus({ preventScroll: true });
  answer.scrollIntoView({ block: "nearest" });
}

// showExplanation shows the answer of /api/explain. denial is the id of the
// denial that was asked for, if any.
function showExplanation(e, denial) {
  const tone =
    { allowed: "good", unmatched: "good", exempt: "good", limited: "warn", failed_open: "warn", failed_local: "warn" }[
      e.decision
    ] ?? "bad";
  const limits = e.limits
    .toSorted((a, b) => b.applies - a.applies)
    .map((l) => {
      const out = l.retry_after !== null || (l.remaining !== null && l.cost > l.remaining);
      const remaining = l.remaining === null ? "unknown" : whole.format(l.remaining);
      const item = make(
        "li",
        { class: l.applies ? undefined : "off" },
        make(
          "div",
          { class: "top" },
          make("b", {}, l.name),
          l.applies ? "applies" : "does not apply",
          l.mode === "shadow" ? make("span", { class: "tag" }, "shadow") : "",
          l.applies && l.burst !== null
            ? make(
                "span",
                { class: "what" },
                `cost ${l.cost}, remaining ${remaining} of ${whole.format(l.burst)} tokens` +
                  (l.held ? `, held ${whole.format(l.held)}` : "") +
                  (l.owed ? `, owed ${whole.format(l.owed)}` : ""),
              )
            : "",
        ),
      );
      if (l.applies && l.remaining !== null && l.burst) {
        const level = make("div");
        level.style.width = (100 * l.remaining) / l.burst + "%";
        item.append(make("div", { class: "level" + (out ? " out" : ""), "aria-hidden": "true" }, level));
      }
      item.append(
        make(
          "small",
          {},
          [
            l.reason,
            l.applies ? "rate " + l.rate : "",
            l.settle !== null ? "settle " + l.settle : "",
            l.lease !== null ? "lease " + l.lease : "",
            l.retry_after !== null ? `retry in ${l.retry_after} s` : "",
          ]
            .filter(Boolean)
            .join("; "),
        ),
      );
      if (l.key !== null) item.append(make("small", { class: "mono" }, "key " + l.key));
      return item;
    });
  $("answer").replaceChildren(
    make("h3", { class: tone }, denial ? "This request now: " : "", make("b", {}, e.decision.replace("_", " "))),
    make("p", { class: "note" }, [`client ${e.client || "unknown"}`, e.note].filter(Boolean).join("; ")),
    limits.length ? make("ul", { class: "verdicts" }, ...limits) : make("p", { class: "empty" }, "No limits."),
  );
}

// Polling: one round at a time, and none while the page is hidden.
let timer,
  round = 0;
// poll gets and shows everything, and schedules the next round.
async function poll() {
  clearTimeout(timer);
  const mine = ++round;
  try {
    const [status, past, limits, denials] = await Promise.all([
      fetchJSON("status"),
      fetchJSON("history"),
      fetchJSON("limits?filter=" + encodeURIComponent($("filter").value.trim())),
      fetchJSON("denials"),
    ]);
    if (mine !== round) return; // a newer round has begun
    if (cursor !== null)
      cursor = Math.max(
        0,
        past.findIndex((s) => s.at === seconds[cursor]?.at),
      );
    seconds = past;
    drawTraffic();
    showStatus(status);
    showLimits(limits);
    showDenials(denials, new Date(status.now));
    showTop(chosen === null ? null : await fetchJSON("top?limit=" + encodeURIComponent(chosen)));
  } catch (e) {
    if (mine !== round) return;
    $("state").className = "state bad";
    setText($("state"), "Unreachable");
    update($("alarms"), [
      make(
        "div",
        { class: "alarm bad" },
        make("b", {}, "The sidecar does not answer."),
        " The page shows its last answer.",
      ),
    ]);
  }
  if (mine === round && !document.hidden) timer = setTimeout(poll, every);
}
document.addEventListener("visibilitychange", () => !document.hidden && poll());
poll();
