// Words: sizes and counts, what is said of a box, the tree of groups at the left, the details at the right.

function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(n) < 1024) return unit === "B" ? `${n} B` : `${n.toFixed(1)} ${unit}`;
    n /= 1024;
  }
  return `${n.toFixed(1)} TiB`;
}

function count(n) {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (n >= size) return `${(n / size).toPrecision(3)} ${unit}`;
  }
  return String(n);
}

function seconds(s) {
  return s >= 1 ? `${s.toFixed(2)} s` : s >= 1e-3 ? `${(s * 1e3).toFixed(1)} ms` : `${(s * 1e6).toFixed(0)} us`;
}

const short = (file) => file.split(/[\\/]/).pop();

function describe(scene, box) {
  return box.group ? describeGroup(scene, box.group) : describeOperator(scene, box.node);
}

function describeGroup(scene, g) {
  const whole = scene.roots().reduce((t, r) => t + r.work, 0);
  const rows = [[g.title, ""]];
  if (g.note) rows.push([g.kind, g.note]);
  if (!g.count) return rows;
  rows.push(["ops", String(g.count)], ["flops", count(g.flops)]);
  if (whole) rows.push(["work", `${((100 * g.work) / whole).toFixed(1)}% of the ${scene.title}`]);
  rows.push(["largest", bytes(g.largest)]);
  return rows;
}

function describeOperator(scene, i) {
  const c = scene.columns, loc = scene.loc(i), fate = scene.fate(i), rows = [[scene.op(i), ""]];
  rows.push(["result", scene.out(i)], ["bytes", c.bytes[i] ? bytes(c.bytes[i]) : "none of its own"]);
  rows.push(["flops", c.flops[i] ? count(c.flops[i]) : "no formula"]);
  if (c.times[i] > 1) rows.push(["runs", `${c.times[i]} times`]);
  if (fate) rows.push(["memory", fate[1]]);
  rows.push(["role", scene.tag(i)]);
  if (scene.reads(i)) rows.push(["reads", scene.reads(i)]);
  if (loc) rows.push(["line", `${short(loc[0])}:${loc[1]}${loc[2] ? ` in ${loc[2]}` : ""}`]);
  return rows;
}

function element(tag, text, attributes = {}) {
  const e = document.createElement(tag);
  if (text) e.textContent = text;
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  return e;
}

class Details {
  constructor(root, go) { this.root = root; this.go = go; }

  // What is known of a box, or of the whole when there is none.
  show(scene, box, facts) {
    const rows = box ? describe(scene, box) : [[scene.title, ""], ...facts];
    const list = element("dl");
    for (const [name, text] of rows.slice(1)) list.append(element("dt", name), element("dd", text));
    this.root.replaceChildren(element("h2", rows[0][0]), list);
    if (!box) { this.hints(); return; }
    this.root.append(element("h3", "stands in"), element("div", scene.path(box.group ? box.group.id : scene.columns.group[box.node]).join(" › ")));
    if (box.node !== undefined) this.operator(scene, box.node);
  }

  operator(scene, i) {
    const loc = scene.loc(i);
    if (loc) this.root.append(element("h3", `${loc[0]}:${loc[1]}`), element("code", loc[3] || "(source not found)", { id: "source" }));
    const { ins, outs } = scene.neighbours(i);
    for (const [title, list] of [["reads", ins], ["read by", outs]]) {
      if (!list.length) continue;
      this.root.append(element("h3", title));
      for (const k of list.slice(0, 30)) {
        const link = element("a", `${scene.op(k)} ${scene.out(k)}`, { role: "button", tabindex: "0" });
        link.addEventListener("click", () => this.go(k));
        link.addEventListener("keydown", (e) => { if (e.key === "Enter") this.go(k); });
        this.root.append(link);
      }
    }
  }

  hints() {
    const rows = ["Click a box to open it, its title to close it.", "Drag to move, wheel to zoom.",
      "Thick blue border: kept. Dashed orange: recomputed. Green: a result. Dotted: shares memory. Plain: freed after its last use. Yellow bar: matrix products."];
    this.root.append(element("h3", "reading this page"));
    for (const r of rows) this.root.append(element("p", r));
  }
}

class Tree {
  constructor(root, go) { this.root = root; this.go = go; }

  // Rows for the groups under open ones; at most a few thousand.
  show(scene, selected) {
    const rows = [];
    const add = (g) => {
      if (rows.length > 3000) return;
      const mark = g.groups.length ? (g.open ? "▾ " : "▸ ") : "   ";
      const row = element("div", mark + g.title, { "data-group": g.id });
      row.style.paddingLeft = `${4 + 12 * g.depth}px`;
      row.append(element("span", g.count ? ` ${g.count}` : "", { class: "count" }));
      if (g.id === selected) row.className = "selected";
      row.addEventListener("click", () => this.go(g));
      rows.push(row);
      if (g.open) g.groups.forEach(add);
    };
    scene.roots().forEach(add);
    this.root.replaceChildren(...rows);
  }
}
