"use strict";
// Texts of documents and candidates are untrusted: they reach the page through textContent only.

/** An element with attributes and children; strings become text nodes. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// The values of a panel's curves at the step under the pointer.
(() => {
  const SVG = "http://www.w3.org/2000/svg";

  function nearest(steps, wanted) {
    let best = 0;
    for (let n = 1; n < steps.length; n++) if (Math.abs(steps[n] - wanted) < Math.abs(steps[best] - wanted)) best = n;
    return best;
  }

  function format(value, scale) {
    if (scale === "percent") return `${(100 * value).toFixed(1)} %`.replace("-", "−");
    if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) {
      const [digits, power] = value.toExponential(1).split("e");
      return `${digits}·10^${Number(power)}`.replaceAll("-", "−");
    }
    return String(Number(value.toPrecision(4))).replace("-", "−");
  }

  for (const svg of document.querySelectorAll("svg[data-readouts]")) {
    const { scale, steps: [low, high], area: [left, right, top, bottom], lines } = JSON.parse(svg.dataset.readouts);
    const mark = document.createElementNS(SVG, "line");
    for (const [name, value] of Object.entries({ class: "mark", y1: top, y2: bottom, visibility: "hidden" })) mark.setAttribute(name, value);
    svg.append(mark);
    const tip = make("div", { class: "tip", hidden: "" });
    svg.after(tip);
    const hide = () => {
      tip.hidden = true;
      mark.setAttribute("visibility", "hidden");
    };
    const show = (event) => {
      const box = svg.getBoundingClientRect();
      const unit = box.width / svg.viewBox.baseVal.width;
      const x = (event.clientX - box.left) / unit;
      if (x < left - 4 || x > right + 4) return hide();
      const wanted = low + ((x - left) / (right - left)) * (high - low);
      const all = lines.map((line) => line.steps[nearest(line.steps, wanted)]);
      const step = all[nearest(all, wanted)];
      const at = left + ((step - low) / (high - low)) * (right - left);
      mark.setAttribute("x1", at);
      mark.setAttribute("x2", at);
      mark.setAttribute("visibility", "visible");
      tip.replaceChildren(make("b", {}, `step ${Math.round(step).toLocaleString("en")}`));
      for (const line of lines) {
        const n = nearest(line.steps, step);
        const gap = line.steps.length > 1 ? (line.steps.at(-1) - line.steps[0]) / (line.steps.length - 1) : 0.5;
        if (Math.abs(line.steps[n] - step) > gap / 2) continue;
        tip.append(make("span", { style: `--kind: var(--${line.color})` }, make("i"), `${line.label} `, make("b", {}, format(line.values[n], scale))));
      }
      tip.hidden = false;
      const spot = at * unit;
      tip.style.left = spot > box.width / 2 ? "" : `${spot + 12}px`;
      tip.style.right = spot > box.width / 2 ? `${box.width - spot + 12}px` : "";
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }
})();

// The browser of prefixes and candidates.
(() => {
  const box = document.getElementById("browser");
  if (!box) return;
  const runs = JSON.parse(document.getElementById("pool-data").textContent).runs;
  const OBJECTIVES = ["quality", "safety", "factuality"];
  const KINDS = ["original", "rewrite", "rollout"];

  const option = (value, label) => make("option", { value }, label);
  const isNumber = (value) => typeof value === "number";
  const format = (value, places = 2) => (isNumber(value) ? value.toFixed(places).replace("-", "−") : "–");
  const kindOf = (pool, number) => (number === null || number === undefined ? "none" : pool.candidates[number].kind);
  const runSelect = make("select", {}, ...runs.map((run, n) => option(n, run.name)));
  const chosenSelect = make("select", {}, option("", "any"), ...KINDS.map((k) => option(k, k)), option("none", "no pair chosen"));
  const rejectedSelect = make("select", {}, option("", "any"), ...KINDS.map((k) => option(k, k)));
  const search = make("input", { type: "search", placeholder: "in prefixes and candidates" });
  const order = make("select", {}, option("pool", "as proposed"), option("reward", "by reward"));
  const list = make("ol", { class: "list", "aria-label": "Prefixes" });
  const detail = make("article", { class: "pool", "aria-live": "polite" });
  const count = make("p", { class: "quiet" });
  let shown = [];
  let at = 0;

  function matches(pool) {
    if (chosenSelect.value && kindOf(pool, pool.chosen) !== chosenSelect.value) return false;
    if (rejectedSelect.value && kindOf(pool, pool.rejected) !== rejectedSelect.value) return false;
    const wanted = search.value.trim().toLowerCase();
    return !wanted || [pool.prefix, ...pool.candidates.map((c) => c.text)].some((t) => t.toLowerCase().includes(wanted));
  }

  function refresh() {
    const run = runs[Number(runSelect.value)];
    shown = run.pools.filter(matches);
    const sample = run.pools.length < run.total ? `a sample of ${run.pools.length} of ` : "";
    count.textContent =
      `${shown.length} prefixes match; the report holds ${sample}${run.total.toLocaleString("en")} recorded pools of this run.`;
    list.replaceChildren(...shown.map(item));
    show(0);
  }

  function item(pool, number) {
    const kind = kindOf(pool, pool.chosen);
    const badge = make("span", { class: "kind", style: `--kind: var(--${kind})` }, kind === "none" ? "no pair" : kind);
    return make(
      "li",
      {},
      make(
        "button",
        { type: "button", onclick: () => show(number) },
        make("span", { class: "where" }, `step ${pool.step} · document ${pool.document ?? "–"}`, badge),
        make("bdi", { class: "snippet" }, `…${pool.prefix.trim().slice(-60)}`),
      ),
    );
  }

  function show(number) {
    at = Math.max(0, Math.min(number, shown.length - 1));
    for (const [n, row] of [...list.children].entries()) {
      row.firstChild.setAttribute("aria-current", String(n === at));
      if (n === at) keepInView(row);
    }
    detail.replaceChildren(...(shown.length ? poolView(shown[at]) : [make("p", {}, "No prefix matches.")]));
  }

  /** One prefix on; the button that was pressed is drawn anew and keeps the focus. */
  function turn(button, by) {
    show(at + by);
    detail.querySelectorAll(".pager button")[button].focus();
  }

  /** Scroll the list, never the page. */
  function keepInView(row) {
    const top = row.offsetTop - list.offsetTop;
    if (top < list.scrollTop || top + row.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top;
  }

  function poolView(pool) {
    const numbers = pool.candidates.map((_, n) => n);
    if (order.value === "reward") {
      numbers.sort((a, b) => (pool.candidates[b].reward ?? -1) - (pool.candidates[a].reward ?? -1));
    }
    const names = namesOf(pool);
    const parts = [
      make(
        "div",
        { class: "pager" },
        make("button", { type: "button", onclick: () => turn(0, -1), ...(at === 0 && { disabled: "" }) }, "← previous"),
        make("button", { type: "button", onclick: () => turn(1, 1), ...(at === shown.length - 1 && { disabled: "" }) }, "next →"),
        make("span", { class: "at" }, `${at + 1} of ${shown.length}: step ${pool.step}, document ${pool.document ?? "–"}, cut at token ${pool.cut ?? "–"}`),
      ),
      make("h4", {}, "prefix"),
    ];
    const prefix = make("p", { class: "text prefix", dir: "auto" });
    prefix.textContent = (pool.cut_chars ? `[${pool.cut_chars.toLocaleString("en")} characters before] …` : "") + pool.prefix;
    parts.push(prefix, make("h4", {}, `${pool.candidates.length} candidates`));
    for (const n of numbers) parts.push(candidateView(pool, n, names[n]));
    if (pool.failures?.length) {
      const failures = make("ul", {}, ...pool.failures.map((why) => make("li", {}, String(why))));
      parts.push(make("h4", {}, "judgments that failed"), failures);
    }
    if (pool.pairs?.length) parts.push(make("h4", {}, "pairwise quality: how often the row's candidate beats the column's"), matrix(pool, names));
    return parts;
  }

  function namesOf(pool) {
    let rollouts = 0;
    return pool.candidates.map((c) => (c.kind === "rollout" ? `rollout ${++rollouts}` : c.kind));
  }

  function candidateView(pool, number, name) {
    const candidate = pool.candidates[number];
    const role = number === pool.chosen ? "chosen" : number === pool.rejected ? "rejected" : "";
    const head = make("div", { class: "head" }, make("span", { class: "kind" }, name));
    if (role) head.append(make("span", { class: `flag ${role}` }, role === "chosen" ? "✓ chosen" : "✗ rejected"));
    if ("reward" in candidate) {
      head.append(make("span", { class: "score" }, "reward ", make("b", {}, candidate.reward === null ? "dropped" : format(candidate.reward))));
      for (const objective of OBJECTIVES) {
        const value = candidate[objective];
        const score = make("span", { class: "score" }, `${objective} `, make("b", {}, format(value)));
        if (isNumber(value)) {
          const width = Math.round(100 * Math.max(0, Math.min(1, value)));
          score.append(make("span", { class: "meter", "aria-hidden": "true" }, make("i", { style: `width: ${width}%` })));
        }
        head.append(score);
      }
    }
    if (isNumber(candidate.logprob)) head.append(make("span", { class: "score" }, "log-prob ", make("b", {}, format(candidate.logprob, 1)), " nats"));
    const text = make("p", { class: "text", dir: "auto" });
    text.textContent = candidate.text + (candidate.cut_chars ? `… [${candidate.cut_chars.toLocaleString("en")} more characters]` : "");
    return make("div", { class: `candidate ${role}`, style: `--kind: var(--${KINDS.includes(candidate.kind) ? candidate.kind : "muted"})` }, head, text);
  }

  /** Wins of row over column, the mean over both orders where both were asked. */
  function matrix(pool, names) {
    const size = pool.candidates.length;
    const votes = Array.from({ length: size }, () => Array.from({ length: size }, () => []));
    const asked = new Set();
    for (const [first, second, win] of pool.pairs) {
      asked.add(first * size + second).add(second * size + first);
      if (!isNumber(win)) continue;
      votes[first][second].push(win);
      votes[second][first].push(1 - win);
    }
    const short = names.map((name) => name.replace("original", "orig.").replace("rewrite", "rewr.").replace("rollout ", "r"));
    const table = make("table", { class: "matrix" });
    table.append(make("tr", {}, make("td", {}), ...short.map((name) => make("th", { scope: "col" }, name))));
    for (let i = 0; i < size; i++) {
      const row = make("tr", {}, make("th", { scope: "row" }, short[i]));
      for (let j = 0; j < size; j++) {
        const all = votes[i][j];
        const mean = all.length ? all.reduce((a, b) => a + b, 0) / all.length : null;
        const label = mean !== null ? String(Math.round(100 * mean) / 100) : asked.has(i * size + j) ? "?" : i === j ? "" : "·";
        row.append(make("td", { class: mean === null || mean === 0.5 ? null : mean > 0.5 ? "win" : "loss" }, label));
      }
      table.append(row);
    }
    return make("div", { class: "scroll" }, table);
  }

  const labelled = (text, control, kind = "") => make("label", { class: kind }, text, control);
  const controls = make("div", { class: "controls" });
  if (runs.length > 1) controls.append(labelled("run", runSelect));
  controls.append(
    labelled("chosen is", chosenSelect),
    labelled("rejected is", rejectedSelect),
    labelled("candidates", order),
    labelled("search", search, "search"),
  );
  for (const control of [runSelect, chosenSelect, rejectedSelect]) control.addEventListener("change", refresh);
  order.addEventListener("change", () => show(at));
  search.addEventListener("input", refresh);
  box.append(controls, count, make("div", { class: "split" }, list, detail));
  box.hidden = false;
  refresh();
})();
