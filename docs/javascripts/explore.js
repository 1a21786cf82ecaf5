// The figure of explore.md: one head's outputs as arrows in a plane, by budget and query. Data: docs/data/heads.json.
// Every number is computed beforehand, in all dimensions, by docs/figures/heads.py; nothing here is fitted or estimated.

const NAMES = { plain: "plain eviction", "order 0": "moments, order 0", "order 1": "moments, order 1", summaries: "summaries" };
const MARKS = { plain: "triangle", "order 0": "diamond", "order 1": "square", summaries: "circle" };
const SVG = "http://www.w3.org/2000/svg";

const figure = document.getElementById("explore");
if (figure) start(figure).catch((error) => complain(figure, error));

function complain(figure, error) {
  figure.querySelector(".explore-status").textContent =
    `The figure could not be drawn (${error.message}). It needs the site to be served, by "mkdocs serve" for example.`;
}

async function start(figure) {
  const answer = await fetch(new URL("../data/heads.json", import.meta.url));
  if (!answer.ok) throw new Error(`${answer.status} for ${answer.url}`);
  const data = await answer.json();
  const [head, budget, query] = ["head", "budget", "query"].map((name) => figure.querySelector(`[name=${name}]`));
  head.replaceChildren(...data.heads.map((x, i) => new Option(`layer ${x.layer}, head ${x.head}`, i)));
  budget.max = data.budgets.length - 1;
  budget.value = data.budgets.indexOf(128);
  query.max = data.words.length;
  query.value = 1 + typical(data.heads[0].points[data.budgets.indexOf(128)]);
  const draw = () => show(figure, data, Number(head.value), Number(budget.value), Number(query.value) - 1);
  for (const control of [head, budget, query]) {
    control.disabled = false;
    control.addEventListener("input", draw);
  }
  new ResizeObserver(draw).observe(figure.querySelector("svg").parentElement);
  draw();
}

function show(figure, data, head, budget, query) {
  const all = data.heads[head].points;
  const now = pick(data, all[budget], query);
  write(figure, data, now, data.budgets[budget], query);
  for (const [name, errors] of Object.entries({ plain: all[budget].plain, ...all[budget].corrected }))
    figure.querySelector(`[data-output="${name}"] .explore-mean`).textContent = percent(mean(errors.error ?? errors));
  drawBars(figure, now, Math.max(...all.map((x) => x.plain[query])));
  drawPlane(figure.querySelector("svg"), now, all.map((x) => pick(data, x, query)));
}

// The query for which summaries take the median share of the error away.
function typical(points) {
  const left = points.plain.map((error, query) => [points.corrected.summaries.error[query] / error, query]);
  return left.sort((a, b) => a[0] - b[0])[left.length >> 1][1];
}

// What the data say of one query at one budget.
function pick(data, points, query) {
  const corrected = Object.fromEntries(
    data.corrections.map((name) => {
      const { out, mass, error } = points.corrected[name];
      return [name, { out: out[query], mass: mass[query], error: error[query] }];
    }),
  );
  const plain = { out: points.retained[query], error: points.plain[query], mass: 0 };
  return { mass: points.mass[query], evicted: points.evicted[query], outputs: { plain, ...corrected } };
}

function write(figure, data, now, budget, query) {
  const tokens = `${budget} of ${data.context.toLocaleString("en")} tokens`;
  figure.querySelector(".explore-budget").textContent = tokens;
  figure.querySelector("[name=budget]").setAttribute("aria-valuetext", tokens);
  const read = data.before + data.words.slice(0, query).join("");
  const word = data.words[query].replaceAll("\n", "⏎");
  figure.querySelector(".explore-query").textContent = `token ${query + 1}`;
  figure.querySelector("[name=query]").setAttribute("aria-valuetext", `token ${query + 1}, ${word.trim()}`);
  const mark = document.createElement("mark");
  mark.textContent = word;
  figure.querySelector(".explore-text").replaceChildren(`… ${read.slice(-48).replaceAll("\n", "⏎")}`, mark);
  for (const [name, x] of Object.entries(now.outputs)) {
    const row = figure.querySelector(`[data-output="${name}"]`);
    row.querySelector(".explore-error").textContent = percent(x.error);
    row.querySelector(".explore-mass").textContent = name === "plain" ? "0" : percent(x.mass);
  }
  figure.querySelector(".explore-true-mass").textContent = percent(now.mass);
  const best = Object.entries(now.outputs).sort((a, b) => a[1].error - b[1].error)[0][0];
  figure.querySelector(".explore-status").textContent =
    `${tokens} retained; ${percent(now.mass)} of the attention is on evicted ones. ` +
    `Error of plain eviction ${percent(now.outputs.plain.error)}, with summaries ${percent(now.outputs.summaries.error)}. ` +
    `Nearest to exact: ${NAMES[best]}.`;
}

function drawBars(figure, now, most) {
  for (const [name, x] of Object.entries(now.outputs))
    figure.querySelector(`[data-output="${name}"] .explore-bar`).style.width = `${(100 * Math.min(x.error / most, 1)).toFixed(1)}%`;
}

function percent(x) {
  return `${(100 * x).toFixed(1)} %`;
}

function mean(numbers) {
  return numbers.reduce((sum, x) => sum + x, 0) / numbers.length;
}

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

// Arrows from the origin; lengths in units of the exact output's. `all` are the same query's points at every budget: the
// scale is theirs, so that it stays while the budget changes.
function drawPlane(svg, now, all) {
  const width = svg.parentElement.clientWidth, height = Math.round(Math.min(420, Math.max(280, 0.62 * width))), edge = 44;
  const points = all.flatMap((x) => [x.evicted, ...Object.values(x.outputs).map((y) => y.out)]).concat([[0, 0], [1, 0]]);
  const [xs, ys] = [0, 1].map((axis) => points.map((point) => point[axis]));
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const unit = Math.min((width - 2 * edge) / (right - left), (height - 2 * edge) / (high - low));
  const at = ([x, y]) => [width / 2 + unit * (x - (left + right) / 2), height / 2 - unit * (y - (low + high) / 2)];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  const origin = at([0, 0]), exact = at([1, 0]), plain = at(now.outputs.plain.out), evicted = at(now.evicted);
  const shapes = [line("explore-join", plain, evicted), element("circle", { class: "explore-origin", cx: origin[0], cy: origin[1], r: 3 })];
  for (const [name, [x, y]] of Object.entries({ evicted, plain, exact }))
    shapes.push(line(`explore-${name}`, origin, [x, y]), tip(`explore-${name}`, origin, [x, y]));
  for (const [name, x] of Object.entries(now.outputs)) {
    if (name === "plain") continue;
    const kind = `explore-${name.replace(" ", "-")}`;
    shapes.push(line(`${kind} explore-step`, plain, at(x.out)), mark(`${kind} explore-mark`, MARKS[name], at(x.out)));
  }
  shapes.push(label("explore-exact", exact, origin, "exact"), label("explore-plain", plain, origin, "retained"), label("explore-evicted", evicted, origin, "evicted"));
  svg.replaceChildren(svg.querySelector("title"), svg.querySelector("desc"), ...shapes);

  function label(kind, [x, y], [ox, oy], text) {
    const far = Math.hypot(x - ox, y - oy) || 1;
    const [lx, ly] = [x + 26 * (x - ox) / far, y + 20 * (y - oy) / far];
    const anchor = lx > width - 60 ? "end" : lx < 60 ? "start" : "middle";
    return element("text", { class: kind, x: lx, y: Math.min(height - 4, Math.max(12, ly + 4)), "text-anchor": anchor }, text);
  }
}

function line(kind, [x1, y1], [x2, y2]) {
  return element("line", { class: kind, x1, y1, x2, y2 });
}

function tip(kind, [x1, y1], [x2, y2]) {
  const turn = Math.atan2(y2 - y1, x2 - x1), wing = (side) => [x2 - 10 * Math.cos(turn + side), y2 - 10 * Math.sin(turn + side)];
  return element("polygon", { class: kind, points: [[x2, y2], wing(0.4), wing(-0.4)].join(" ") });
}

function mark(kind, shape, [x, y]) {
  if (shape === "circle") return element("circle", { class: kind, cx: x, cy: y, r: 6 });
  const turn = shape === "diamond" ? `rotate(45 ${x} ${y})` : "";
  return element("rect", { class: kind, x: x - 5, y: y - 5, width: 10, height: 10, transform: turn });
}
