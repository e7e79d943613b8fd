// The operator's page. While it is visible it requests /api/ once a second. It
// shows what it gets as text and never as markup.

import {
  ago,
  clock,
  count,
  duration,
  edge,
  instant,
  make,
  percent,
  period,
  rate,
  setText,
  shape,
  total,
  update,
  wait,
  whole,
} from "./elements.js";

const every = 1000; // milliseconds
const sparkLength = 60; // polls
const nowLength = 10; // seconds of the tiles that say so
const narrow = matchMedia("(max-width: 60rem)"); // as in page.css
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
  const isRound = (m) => Number.isInteger(m) || unit >= 100; // the scale shows it, and its half, without rounding
  return [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((m) => m * unit >= n && isRound(m)) * unit;
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
      const upper = roof.map(point);
      svg.append(
        shape("path", {
          class: "area " + kind,
          d: "M" + upper.join("L") + "L" + floor.map(point).reverse().join("L") + "Z",
        }),
        shape("path", {
          class: "edge " + kind,
          d: edge(
            upper,
            seconds.map((s) => s[kind]),
          ),
        }),
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
  if (cursor !== null && at) legend.unshift(make("li", { class: "at" }, clock(at.at * 1000)));
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

// alarm returns a message at the top of the page. A screen reader reads only its
// title, and only once.
const alarm = (id, tone, title, ...text) =>
  make(
    "div",
    { class: "alarm " + tone, "data-id": id },
    make("b", { role: tone === "info" ? undefined : "alert" }, title),
    ...text,
  );

const failures = {
  failed_closed: "refused",
  failed_open: "passed unlimited",
  failed_local: "limited by this sidecar alone",
  delegated: "left to Envoy",
};

// meanwhile says what on_failure did in an outage.
function meanwhile(checks) {
  const parts = Object.entries(failures)
    .filter(([outcome]) => checks[outcome] > 0)
    .map(([outcome, what]) => `${total(checks[outcome])} ${what}`);
  return parts.length ? "Requests meanwhile: " + parts.join(", ") + "." : "No request fell under on_failure meanwhile.";
}

// alarmsOf returns what an operator should know before all else.
function alarmsOf(s, now) {
  const all = [];
  const { outage } = s.store;
  const reload = s.config.last_reload;
  if (s.draining) all.push(alarm("draining", "warn", "This sidecar is shutting down."));
  if (reload?.result === "failure") {
    all.push(
      alarm(
        "config",
        "bad",
        "Config reload failed, keeping the previous config.",
        " Tried at ",
        instant(reload.at),
        `, ${ago(reload.at, now)}; it is read again when the file changes.`,
        make("pre", {}, reload.mistakes.join("\n")),
      ),
    );
  }
  if (!s.ready && !s.draining) {
    all.push(
      alarm(
        "waiting",
        "bad",
        "Redis is not usable yet.",
        ` ${s.store.address} is asked until it answers. `,
        make("code", { class: "unbroken" }, "sluice doctor --config FILE"),
        " says more.",
        s.store.error ? make("pre", {}, s.store.error) : "",
      ),
    );
  } else if (s.store.breaker_open > 0 || (outage && !outage.until)) {
    all.push(
      alarm(
        "outage",
        "bad",
        "Redis does not answer.",
        ...(outage && !outage.until
          ? [
              " Since ",
              instant(outage.since),
              ` (${period(outage.seconds)}) on_failure decides. ${meanwhile(outage.checks)} `,
            ]
          : [" Until it does, on_failure decides. "]),
        make("code", { class: "unbroken" }, "sluice doctor --config FILE"),
        " says why.",
      ),
    );
  } else if (outage && now - new Date(outage.until) < 15 * 60e3) {
    all.push(
      alarm(
        "outage",
        "good",
        "Redis answers again.",
        " It was away for ",
        period(outage.seconds),
        ", from ",
        instant(outage.since),
        " to ",
        instant(outage.until),
        `. ${meanwhile(outage.checks)}`,
      ),
    );
  }
  if (hasErrors(s, now))
    all.push(
      alarm(
        "errors",
        "warn",
        `${count(s.store.errors_last_minute, "Redis error", "Redis errors")} in the last minute.`,
      ),
    );
  if (s.config.mode === "shadow") {
    all.push(
      alarm(
        "shadow",
        "info",
        "Shadow mode: no limit of the config denies.",
        " What they would deny is counted, logged and shown here. ",
        make("code", { class: "unbroken" }, "mode: enforce"),
        " ends it.",
      ),
    );
  }
  if (wasNeverAsked(s)) {
    all.push(
      alarm(
        "never-asked",
        now - new Date(s.started) > 60e3 ? "warn" : "info",
        "No check yet: does Envoy ask this sidecar?",
        ` It started ${ago(s.started, now)}. If requests have gone through Envoy since, its filter chain lacks the filter that `,
        make("code", {}, "sluice envoy"),
        " prints, or its cluster leads elsewhere than to ",
        make("code", {}, s.grpc),
        ". ",
        make("code", { class: "unbroken" }, "sluice doctor --envoy-admin URL"),
        " says which.",
      ),
    );
  }
  return all;
}

// hasErrors reports whether Redis failed in the last minute other than in an
// outage.
const hasErrors = (s, now) =>
  s.store.breaker_open === 0 &&
  s.store.errors_last_minute > 0 &&
  s.ready &&
  !(s.store.outage && (!s.store.outage.until || now - new Date(s.store.outage.until) < 60e3));

// showLatency shows the quantiles of durations, or that there were none.
function showLatency(id, q, none) {
  const isNone = q.p50 === null;
  setText($(id + "-p50"), duration(q.p50));
  setText($(id + "-p99"), duration(q.p99));
  setText($(id + "-of"), isNone ? none : "median, last minute");
  $(id + "-tail").hidden = isNone;
}

const wasNeverAsked = (s) => Object.values(s.checks).every((n) => n === 0);

// showStatus shows GET /api/status.
function showStatus(s) {
  const now = new Date(s.now);
  document.title = `sluice · ${s.domain}`;
  setText($("domain"), s.domain);
  setText($("version"), s.version);
  const neverAsked = wasNeverAsked(s);
  const [tone, word] = s.draining
    ? ["warn", "Draining"]
    : !s.ready
      ? ["bad", "Waiting for Redis"]
      : s.store.breaker_open > 0
        ? ["bad", "Without Redis"]
        : neverAsked
          ? ["warn", "Ready, never asked"]
          : s.config.last_reload?.result === "failure"
            ? ["warn", "Ready, previous config"]
            : s.config.mode === "shadow"
              ? ["warn", "Ready, shadow mode"]
              : ["good", "Ready"];
  $("state").className = "state " + tone;
  setText($("state"), word);

  const last = seconds.slice(-nowLength);
  const mean = (of) => last.reduce((sum, x) => sum + of(x), 0) / last.length;
  const all = mean((x) => x.passed + x.limited + x.refused);
  const refused = mean((x) => x.refused);
  setText($("now-checks"), last.length ? rate(all) : "–");
  setText(
    $("last-check"),
    neverAsked
      ? "none since the start"
      : s.last_check
        ? "last one " + ago(s.last_check, now).replace(/^now$/, "just now")
        : "",
  );
  setText(
    $("now-limited"),
    last.length
      ? percent(
          mean((x) => x.limited),
          all,
        )
      : "–",
  );
  $("now-refused").className = "second" + (refused > 0 ? " bad" : "");
  setText($("limited-of"), all > 0 ? "of checks, last 10 s" : "no checks in the last 10\u00a0s");
  setText(
    $("now-refused"),
    refused > 0
      ? percent(refused, all) + " refused"
      : s.config.mode === "shadow"
        ? "shadow mode denies none"
        : "none refused",
  );
  const inRedis = s.store.kind === "redis";
  showLatency("now", s.check_seconds, "no checks in the last minute");
  showLatency("store", s.store.seconds, "no calls in the last minute");
  setText($("store-title"), inRedis ? "Redis latency" : "Buckets");
  $("store-alone").hidden = inRedis;
  if (!inRedis) {
    setText($("store-p50"), total(s.store.entries));
    setText($("store-of"), "in this process");
  }
  update($("alarms"), alarmsOf(s, now));

  const decided = Object.entries(s.checks).filter(([, n]) => n > 0);
  rows("checks", [
    ["Listens on", make("code", {}, s.grpc)],
    ["Last check", s.last_check ? ago(s.last_check, now) : neverAsked ? "none" : "now", neverAsked ? "bad" : ""],
    ...decided.map(([decision, n]) => [
      sentence(decision.replaceAll("_", " ")),
      total(n),
      decision.startsWith("failed") || decision === "delegated" || decision === "invalid" ? "bad" : "",
    ]),
  ]);
  const errors = Object.entries(s.store.errors).filter(([, n]) => n > 0);
  const { outage } = s.store;
  rows("store", [
    ["Where", inRedis ? `Redis, ${s.store.address}` : "in this process"],
    [
      "State",
      !inRedis
        ? "good"
        : !s.ready && !s.draining
          ? "not usable yet"
          : s.store.breaker_open > 0
            ? "does not answer"
            : hasErrors(s, now)
              ? "some errors"
              : "answers",
      s.store.breaker_open > 0 || hasErrors(s, now) || (inRedis && !s.ready && !s.draining) ? "bad" : "good",
    ],
    ...(inRedis
      ? [
          [
            "Last outage",
            outage
              ? outage.until
                ? `${period(outage.seconds)}, ended ${ago(outage.until, now)}`
                : `now, for ${period(outage.seconds)}`
              : "none since the start",
            outage && !outage.until ? "bad" : "",
          ],
          [
            "Errors",
            errors.length
              ? errors.map(([kind, n]) => `${kind} ${total(n)}`).join(", ") + " since the start"
              : "none since the start",
          ],
          ["Last minute", count(s.store.errors_last_minute, "error", "errors")],
        ]
      : []),
    ["Buckets in process", `${total(s.store.entries)}`],
  ]);
  const reload = s.config.last_reload;
  rows("config", [
    ["File", s.config.file || "none, limits come from Envoy’s routes"],
    ["Hash", make("code", {}, s.config.hash)],
    ["Mode", s.config.mode === "shadow" ? "shadow, denies nothing" : s.config.mode],
    [
      "Limits",
      total(s.config.limits) +
        (s.config.shadow_limits && s.config.mode !== "shadow"
          ? `, ${total(s.config.shadow_limits)} in shadow mode`
          : ""),
    ],
    ...(s.config.warnings
      ? [
          [
            "Warnings",
            make("span", {}, total(s.config.warnings), ", ", make("code", {}, "sluice validate"), " says which"),
          ],
        ]
      : []),
    [
      "Last reload",
      reload
        ? `${reload.result === "failure" ? "rejected" : "in force"}, ${ago(reload.at, now)}`
        : "none since the start",
      reload?.result === "failure" ? "bad" : "",
    ],
    ["Started", ago(s.started, now)],
    ["Log level", s.log_level],
  ]);
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1);

// rows shows a list of [name, value, tone].
function rows(id, all) {
  update(
    $(id),
    all.flatMap(([name, value, tone]) => [make("dt", {}, name), make("dd", { class: tone || undefined }, value)]),
  );
}

// The limits, with their rates since this page was opened.
const seen = new Map(); // from a limit's name, mode and source to {at, allowed, limited, rates}
let chosen = null; // the name of the limit whose keys are shown; "" is none

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

// spark returns a small chart of rates. denied is the class of what is denied.
function spark(rates, denied) {
  const svg = shape("svg", {
    viewBox: `0 0 ${sparkLength - 1} 100`,
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  svg.append(shape("line", { class: "grid", x1: 0, x2: sparkLength - 1, y1: 100, y2: 100 }));
  if (rates.length < 2 || rates.every((r) => r.allowed + r.limited === 0)) return svg;
  const top = Math.max(0.001, ...rates.map((r) => r.allowed + r.limited)) * 1.1;
  const x = (i) => sparkLength - rates.length + i;
  const point = (v, i) => `${x(i)} ${(100 - (100 * v) / top).toFixed(1)}`;
  const lower = rates.map((r, i) => point(r.allowed, i));
  const upper = rates.map((r, i) => point(r.allowed + r.limited, i));
  svg.append(shape("path", { class: "area passed", d: `M${x(0)} 100L${lower.join("L")}L${x(rates.length - 1)} 100Z` }));
  if (rates.some((r) => r.limited > 0)) {
    svg.append(
      shape("path", { class: "area " + denied, d: "M" + upper.join("L") + "L" + lower.toReversed().join("L") + "Z" }),
      shape("path", {
        class: "edge " + denied,
        d: edge(
          upper,
          rates.map((r) => r.limited),
        ),
      }),
    );
  }
  svg.append(
    shape("path", {
      class: "edge passed",
      d: edge(
        lower,
        rates.map((r) => r.allowed),
      ),
    }),
  );
  return svg;
}

const idOf = (l) => `${l.from} ${l.mode} ${l.name}`;
const firstLimits = () => (narrow.matches ? 20 : 100); // that are shown
const mostLimits = 1000; // that the API gives
let shownLimits = firstLimits();
let order = null; // null: what the sidecar chooses

// limitsQuery returns the query of GET /api/limits.
function limitsQuery() {
  const query = { filter: $("filter").value.trim(), n: shownLimits };
  if (order !== null) query.sort = order;
  return new URLSearchParams(query);
}

// limitRow returns the row of a limit. isPlain says that all limits are of one
// mode, which the head of the table tells.
function limitRow(l, now, isPlain) {
  const s = note(l, now);
  const last = s.rates.at(-1) ?? { allowed: 0, limited: 0 };
  const isShadow = l.mode === "shadow";
  const tags = [];
  if (isShadow) tags.push(" ", make("span", { class: "tag shadow" }, "shadow"));
  if (l.from === "route") tags.push(" ", make("span", { class: "tag" }, "from a route"));
  if (l.group) tags.push(" ", make("span", { class: "tag" }, "group " + l.group));
  const key = l.key.length ? "by " + l.key.join(" · ") : l.from === "config" ? "one bucket for all" : "";
  const overrides = l.overrides ? count(l.overrides, "override", "overrides") : "";
  const comma = key && overrides ? ", " : "";
  const isChosen = l.name === chosen;
  return make(
    "tr",
    { class: isChosen ? "chosen" : undefined, "data-id": idOf(l) },
    make(
      "td",
      {},
      make(
        "button",
        {
          type: "button",
          "data-limit": l.name,
          "aria-pressed": narrow.matches ? undefined : String(isChosen),
          "aria-expanded": narrow.matches ? String(isChosen) : undefined,
        },
        l.name,
      ),
      ...tags,
      make(
        "small",
        { class: "mono about", title: key + comma + overrides },
        key + comma,
        make("span", { class: "unbroken" }, overrides),
      ),
    ),
    make(
      "td",
      { class: "rate" },
      l.rate || l.quota || "–",
      l.quota ? make("small", {}, "quota") : "",
      l.burst ? make("small", {}, "burst " + whole.format(l.burst)) : "",
      l.lease ? make("small", {}, "lease " + l.lease) : "",
      l.settle ? make("small", {}, "settles") : "",
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
        class: "num" + (last.limited > 0 ? (isShadow ? " would" : " hot") : ""),
        "data-label": isShadow ? "Would deny" : "Denied",
      },
      make("b", {}, rate(last.limited) + "/s"),
      make("span", { class: "total" }, total(l.limited)),
      isShadow && !isPlain ? make("span", { class: "total mode" }, "would deny") : "",
    ),
    make("td", { class: "spark" }, spark(s.rates, isShadow ? "would" : "limited")),
  );
}

// showLimits shows GET /api/limits, and beside the limits or below the chosen
// one what its keys do. isWithoutRedis says that on_failure decides meanwhile.
function showLimits({ total: all, sort, limits }, top, isWithoutRedis) {
  const now = performance.now();
  const areShadow = limits.length > 0 && limits.every((l) => l.mode === "shadow");
  const isPlain = areShadow || limits.every((l) => l.mode !== "shadow");
  const detail = limits.filter((l) => l.name === chosen).slice(0, 1);
  update(
    $("limits-rows"),
    limits.flatMap((l) => {
      const row = limitRow(l, now, isPlain);
      if (!narrow.matches || l !== detail[0]) return [row];
      return [
        row,
        make("tr", { class: "detail", "data-id": "detail" }, make("td", { colspan: 5 }, ...detailOf(l, top))),
      ];
    }),
  );
  update($("top"), narrow.matches || !detail[0] ? [] : detailOf(detail[0], top));
  $("top").hidden = narrow.matches || !detail[0];
  setText($("limits-denied"), areShadow ? "Would deny" : "Denied");
  $("sort").value = sort;
  const shown =
    all > limits.length
      ? `${total(limits.length)} of ${total(all)}` + (order === null ? ", those that denied most" : "")
      : $("filter").value
        ? `${total(all)} found`
        : all > 10
          ? total(all)
          : "";
  const failing = isWithoutRedis ? "on_failure decides until Redis answers" : "";
  setText($("limits-note"), [shown, failing].filter(Boolean).join("; "));
  const isMore = all > limits.length && limits.length < mostLimits;
  $("limits-more").hidden = !isMore;
  setText($("limits-more"), `Show ${total(Math.min(firstLimits(), all - limits.length))} more`);
  if (narrow.matches) $("limits-scroll").removeAttribute("tabindex");
  else $("limits-scroll").tabIndex = limits.length > 8 ? 0 : -1; // so that keys can scroll it
  $("limits-empty").hidden = limits.length > 0;
  setText(
    $("limits-empty"),
    $("filter").value
      ? "No limit has this in its name, group or key."
      : "No limits. Limits of Envoy’s routes appear with their first request.",
  );
}
$("limits-rows").addEventListener("click", (e) => {
  const name = e.target.closest("[data-limit]")?.dataset.limit;
  if (name === undefined) return;
  chosen = name === chosen && narrow.matches ? "" : name; // on a narrow page it closes, too
  poll();
});
$("filter").addEventListener("input", () => {
  shownLimits = firstLimits();
  poll();
});
$("sort").addEventListener("change", () => {
  order = $("sort").value;
  $("limits-scroll").scrollTop = 0;
  poll();
});
$("limits-more").addEventListener("click", () => {
  shownLimits = Math.min(mostLimits, shownLimits + firstLimits());
  poll();
});
narrow.addEventListener("change", () => {
  shownLimits = firstLimits();
  poll();
});

// keyOf returns an element that shows a key by its parts. Secret parts are
// hashes.
function keyOf(parts, key) {
  if (!parts?.length)
    return make("span", { class: "key" }, make("span", {}, key === "" ? "–" : key === "-" ? "all" : key));
  return make(
    "span",
    { class: "key", title: key }, // as logs have it
    ...parts.map((p) =>
      make(
        "span",
        { class: p.kind },
        p.kind === "hash" ? p.text.slice(0, 10) + "…" : p.text || (p.kind === "absent" ? "" : "empty"),
      ),
    ),
  );
}

// detailOf returns what is known of a limit, with GET /api/top of it.
function detailOf(l, top) {
  const isShadow = l.mode === "shadow";
  const facts = [
    ["Rate", l.rate ? l.rate + (l.burst ? `, burst ${whole.format(l.burst)}` : "") : ""],
    ["Quota", l.quota ?? ""],
    ["Key", l.key.length ? make("code", {}, l.key.join(" · ")) : l.from === "config" ? "one bucket for all" : ""],
    ["Mode", isShadow ? "shadow, denies nobody" : ""],
    [
      "Lease",
      l.lease
        ? `${l.lease}; ${count(l.leased.keys, "key", "keys")} leased now, ${count(l.leased.takes, "take", "takes")}`
        : "",
    ],
    ["Settle", l.settle ? make("span", {}, make("code", {}, l.settle), ` within ${l.settle_within}`) : ""],
    [
      "Settled",
      l.settled
        ? [
            `${total(l.settled.returned)} returned`,
            `${total(l.settled.surcharged)} surcharged`,
            `${total(l.settled.forgiven)} forgiven`,
            count(l.settled.expired, "end missing", "ends missing"),
          ].join(", ")
        : "",
    ],
    ["Tokens taken", total(l.tokens)],
  ].filter(([, value]) => value !== "");
  const wasAsked = l.allowed + l.limited > 0;
  const lists = [
    [
      "top-denials",
      isShadow ? "Would be denied most" : "Most denied",
      top?.denials,
      isShadow ? "would" : "denied",
      "None.",
    ],
    ["top-requests", "Most requests", top?.requests, "", "None."],
  ].map(([id, title, keys, kind, none]) => [
    make("h3", {}, title),
    make("ol", { class: "bars " + kind, id }, ...barsOf(keys ?? [], none)),
  ]);
  return [
    make(
      "div",
      { class: "head" },
      make("h2", { id: "top-title" }, "Top keys of ", make("span", { class: "name" }, l.name)),
      make("p", { class: "note" }, "last five to ten minutes"),
    ),
    ...(top && !top.counted && wasAsked
      ? [make("p", { class: "empty" }, "The keys of this limit are not counted: a hundred other limits were first.")]
      : lists.flat()),
    make("h3", {}, "The limit"),
    make("dl", { class: "facts" }, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
  ];
}

// barsOf returns the items of a list of keys.
function barsOf(keys, none) {
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
  return bars.length ? bars : [make("li", { class: "empty" }, none)];
}

const decisions = {
  limited: "limited",
  shadow_limited: "would be limited",
  failed_closed: "store failed",
  delegated: "left to Envoy",
  invalid: "error in the config",
};

const mostDenials = 25; // that are shown
let denials = []; // GET /api/denials
let denialsAt = null; // when they were asked for

// retryOf says when the request of a denial could pass.
function retryOf(d, now) {
  if (d.retry_after === null) return "";
  const left = Math.ceil(d.retry_after - (now - new Date(d.last)) / 1000);
  return left > 0 ? `retry in ${wait(left)}` : "may pass by now";
}

// showDenials shows GET /api/denials.
function showDenials(all, now) {
  denials = all;
  denialsAt = now;
  const shadows = all.filter((d) => d.shadow).length;
  $("denials-kind").hidden = shadows === 0 || shadows === all.length;
  setText($("denials-title"), shadows > 0 && shadows === all.length ? "Latest would-be denials" : "Latest denials");
  const kind = $("denials-kind").hidden ? "" : $("denials-kind").value;
  const text = $("denials-filter").value.trim().toLowerCase();
  const found = all.filter(
    (d) =>
      (kind === "" || d.shadow === (kind === "shadow")) &&
      [d.limit, d.key, d.client, d.source, d.host, d.path, d.request_id].some((t) => t.toLowerCase().includes(text)),
  );
  // No row moves from under a pointer, or from the focus.
  const isHeld = $("denials-rows").matches(":hover, :focus-within");
  if (isHeld) {
    const places = new Map([...$("denials-rows").children].map((row, i) => [row.dataset.id, i]));
    const place = (d) => places.get(String(d.id)) ?? Infinity;
    found.sort((a, b) => (place(a) === place(b) ? 0 : place(a) - place(b)));
  }
  setText(
    $("denials-note"),
    "grouped by limit, key and outcome" +
      (found.length > mostDenials ? `; the latest ${mostDenials} of ${found.length}` : "") +
      (isHeld ? "; the order is held while you are here" : ""),
  );
  update(
    $("denials-rows"),
    found.slice(0, mostDenials).map((d) => {
      const peer = d.source && d.source !== d.client ? d.source : "";
      return make(
        "tr",
        { "data-id": d.id, class: d.shadow ? "would" : undefined },
        make("td", { class: "when" }, ago(d.last, now)),
        make("td", { class: "num" }, make("b", {}, total(d.count)), "×"),
        make(
          "td",
          { class: "limit" },
          make("b", {}, d.limit || "–"),
          make("small", {}, (d.shadow ? "shadow: " : "") + (decisions[d.decision] ?? d.decision)),
        ),
        make("td", { class: "keys" }, keyOf(d.parts, d.key)),
        make("td", { class: "why" }, d.reason, make("small", {}, retryOf(d, now))),
        make(
          "td",
          { class: "request mono" },
          `${d.method} ${d.host}${d.path}`,
          make(
            "small",
            {},
            d.client ? "client " + d.client : "",
            d.client && peer ? ", " : "",
            peer ? "peer " + peer : "",
          ),
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
      );
    }),
  );
  $("denials-filter").hidden = all.length === 0;
  $("denials-empty").hidden = found.length > 0;
  setText(
    $("denials-empty"),
    all.length > 0
      ? `None of the ${count(all.length, "group", "groups")} of denials here has this. Earlier ones are in the logs.`
      : "No denials since this sidecar started.",
  );
}
for (const [id, event] of [
  ["denials-kind", "change"],
  ["denials-filter", "input"],
])
  $(id).addEventListener(event, () => denialsAt && showDenials(denials, denialsAt));
$("denials-rows").addEventListener("click", (e) => {
  const id = e.target.closest("[data-denial]")?.dataset.denial;
  if (id === undefined) return;
  const d = denials.find((one) => String(one.id) === id);
  const fields = $("form").elements;
  for (const name of ["method", "host", "path", "source"]) fields[name].value = d?.[name] ?? "";
  for (const name of ["principal", "header", "context"]) fields[name].value = "";
  $("form-note").hidden = false;
  explain(new URLSearchParams({ denial: id }));
});
$("form").addEventListener("input", () => ($("form-note").hidden = true));

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
  const isOut = (l) => l.retry_after !== null || (l.remaining !== null && l.cost > l.remaining);
  const deniers = e.decision === "limited" ? e.limits.filter((l) => l.applies && l.mode !== "shadow" && isOut(l)) : [];
  const limits = e.limits
    .toSorted((a, b) => deniers.includes(b) - deniers.includes(a) || b.applies - a.applies)
    .map((l) => {
      const out = isOut(l);
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
            l.applies ? (l.quota !== null ? "quota " + l.quota : "rate " + l.rate) : "",
            l.applies && l.plan !== null ? "plan " + l.plan : "",
            l.settle !== null ? "settle " + l.settle : "",
            l.lease !== null ? "lease " + l.lease : "",
            l.retry_after !== null ? `retry in ${wait(l.retry_after)}` : "",
          ]
            .filter(Boolean)
            .join("; "),
        ),
      );
      if (l.key !== null)
        item.append(make("small", { class: "mono" }, "key " + l.key, l.key === "-" ? " (one bucket for all)" : ""));
      return item;
    });
  $("answer").replaceChildren(
    make(
      "h3",
      { class: tone },
      denial ? "The denied request now: " : "",
      make("b", {}, e.decision.replace("_", " ")),
      deniers.length ? " by " + deniers.map((l) => l.name).join(", ") : "",
    ),
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
  const began = performance.now();
  try {
    const [status, past, limits, latest] = await Promise.all([
      fetchJSON("status"),
      fetchJSON("history"),
      fetchJSON("limits?" + limitsQuery()),
      fetchJSON("denials"),
    ]);
    if (mine !== round) return; // a newer round has begun
    const isKnown = limits.limits.some((l) => l.name === chosen);
    if (!isKnown && (chosen !== "" || !narrow.matches)) // beside a wide list one is always chosen
      chosen = narrow.matches ? "" : (limits.limits[0]?.name ?? null);
    const top = chosen ? await fetchJSON("top?limit=" + encodeURIComponent(chosen)) : null;
    if (mine !== round) return;
    if (cursor !== null)
      cursor = Math.max(
        0,
        past.findIndex((s) => s.at === seconds[cursor]?.at),
      );
    seconds = past;
    drawTraffic();
    showStatus(status);
    showLimits(limits, top, status.store.breaker_open > 0);
    showDenials(latest, new Date(status.now));
  } catch (e) {
    if (mine !== round) return;
    $("state").className = "state bad";
    setText($("state"), "Unreachable");
    update($("alarms"), [alarm("gone", "bad", "The sidecar does not answer.", " The page shows its last answer.")]);
  }
  document.body.dataset.polls = round; // for tests
  if (mine === round && !document.hidden) {
    // A config of thousands of limits takes a sidecar time to report: it is asked
    // less often, so that an open page costs it little.
    timer = setTimeout(poll, Math.max(every, 4 * (performance.now() - began)));
  }
}
document.addEventListener("visibilitychange", () => !document.hidden && poll());
poll();
