// The charts below: memory over the run, time by stage and module, the time-memory curve of a sweep.

const HOLDER = ["blue", "purple", "grey", "green", "orange", "yellow"];

class Chart {
  constructor(id, view) {
    this.area = document.getElementById(id);
    this.head = document.getElementById(`${id}-head`);
    this.canvas = document.getElementById(`${id}-canvas`);
    this.view = view; // for its colours
    this.area.hidden = false;
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  begin() {
    const c = this.canvas, ratio = devicePixelRatio || 1, w = c.clientWidth, h = c.clientHeight;
    c.width = Math.round(w * ratio);
    c.height = Math.round(h * ratio);
    const x = c.getContext("2d");
    x.setTransform(ratio, 0, 0, ratio, 0, 0);
    x.font = "11px system-ui, 'Segoe UI', Helvetica, Arial, sans-serif";
    x.textBaseline = "middle";
    return { x, w, h, colour: this.view.colour };
  }

  text(...parts) { this.head.replaceChildren(...parts); }
}

// Bytes alive after every equation, stage after stage, stacked by what holds them.
class Memory extends Chart {
  constructor(view, data, go) {
    super("memory", view);
    this.data = data;
    this.go = go;
    this.stages = data.memory;
    this.total = this.stages.map((s) => s.nodes.map((_, i) => s.live.reduce((t, l) => t + l[i], 0)));
    this.count = this.total.reduce((t, s) => t + s.length, 0);
    this.top = Math.max(data.peak || 0, data.budget && data.budget < 2 * data.peak ? data.budget : 0,
      ...this.total.map((s) => s.reduce((a, b) => Math.max(a, b), 0)), ...(data.measured?.memory || []).map((m) => m[2]), 1) * 1.08;
    this.legend();
    this.canvas.addEventListener("pointermove", (e) => this.hover(e));
    this.canvas.addEventListener("click", (e) => { const p = this.point(e.offsetX); if (p) this.go(p.stage.stage, p.stage.nodes[p.i]); });
    this.draw();
  }

  legend() {
    const used = this.data.holders.map((_, k) => this.stages.some((s) => s.live[k].some((v) => v > 0)));
    const parts = [element("span", `memory: predicted peak ${bytes(this.data.peak)}` +
      (this.data.budget ? `, budget ${bytes(this.data.budget)}` : "") + (this.data.measured?.memory.length ? ", line: measured" : ""))];
    this.data.holders.forEach((name, k) => {
      if (!used[k]) return;
      const key = element("span", ""), colour = element("span", "", { class: "key" });
      colour.style.background = `var(--${HOLDER[k]})`;
      key.append(colour, name);
      parts.push(key);
    });
    this.said = element("span", "");
    this.text(...parts, this.said);
  }

  spans() {
    let from = 0;
    return this.stages.map((stage, k) => { const at = from; from += this.total[k].length; return { stage, k, at, n: this.total[k].length }; });
  }

  point(px) {
    const at = Math.floor((px / this.canvas.clientWidth) * this.count);
    const span = this.spans().find((s) => at >= s.at && at < s.at + s.n);
    return span ? { stage: span.stage, k: span.k, i: at - span.at } : null;
  }

  hover(e) {
    const p = this.point(e.offsetX);
    if (!p) return;
    const parts = this.data.holders.map((name, k) => [p.stage.live[k][p.i], name]).filter(([v]) => v > 0).map(([v, name]) => `${name} ${bytes(v)}`);
    this.said.textContent = `${p.stage.stage}: ${bytes(this.total[p.k][p.i])} = ${parts.join(" + ")}`;
  }

  draw() {
    const { x, w, h, colour } = this.begin(), y = (v) => h - (v / this.top) * h;
    for (const { stage, k, at, n } of this.spans()) {
      const left = (at / this.count) * w, width = (n / this.count) * w;
      for (let px = 0; px < width; px++) this.column(x, colour, stage, this.total[k], left + px, (px / width) * n, ((px + 1) / width) * n, y);
      x.strokeStyle = colour.text;
      x.lineWidth = 1;
      if (at) { x.beginPath(); x.moveTo(left, 0); x.lineTo(left, h); x.stroke(); }
      this.measured(x, colour, stage, left, width, y);
      if (width > 60) this.label(x, colour, stage.stage, left + 8, h - 12);
    }
    this.level(x, w, y, this.data.peak, colour.text, [2, 3], "predicted peak");
    if (this.data.budget) this.level(x, w, y, this.data.budget, colour.orange, [8, 3], "budget");
  }

  // A word on a ground of its own, legible over what is drawn.
  label(x, colour, text, left, middle) {
    x.fillStyle = colour.panel;
    x.globalAlpha = 0.85;
    x.fillRect(left - 4, middle - 8, x.measureText(text).width + 8, 16);
    x.globalAlpha = 1;
    x.fillStyle = colour.text;
    x.fillText(text, left, middle);
  }

  // One pixel column: the highest of its points.
  column(x, colour, stage, total, px, from, to, y) {
    let best = Math.min(Math.floor(from), total.length - 1);
    for (let i = best; i < Math.min(Math.ceil(to), total.length); i++) if (total[i] > total[best]) best = i;
    let base = 0;
    stage.live.forEach((live, k) => {
      if (!live[best]) return;
      x.fillStyle = colour[HOLDER[k]];
      x.globalAlpha = k === 2 ? 0.45 : 0.8;
      x.fillRect(px, y(base + live[best]), 1.05, y(base) - y(base + live[best]));
      base += live[best];
    });
    x.globalAlpha = 1;
  }

  measured(x, colour, stage, left, width, y) {
    const points = (this.data.measured?.memory || []).filter((m) => m[0] === stage.stage);
    if (!points.length) return;
    x.strokeStyle = colour.text;
    x.lineWidth = 1.5;
    x.beginPath();
    points.forEach(([, at, live], i) => { const px = left + at * width; if (i) x.lineTo(px, y(live)); else x.moveTo(px, y(live)); });
    x.stroke();
  }

  level(x, w, y, value, colour, dash, name) {
    if (!value || value > this.top) return;
    x.strokeStyle = x.fillStyle = colour;
    x.lineWidth = 1.5;
    x.setLineDash(dash);
    x.beginPath(); x.moveTo(0, y(value)); x.lineTo(w, y(value)); x.stroke();
    x.setLineDash([]);
    x.textAlign = "right";
    x.fillText(name, w - 6, y(value) + 8);
    x.textAlign = "left";
  }
}

// One bar per stage: its operators in order, as wide as their work, run together by module until zoomed in.
class Time extends Chart {
  constructor(view, scenes, data, go) {
    super("time", view);
    this.go = go;
    this.scenes = scenes.filter((s) => s.key !== "levels");
    const measured = data.measured?.seconds || {};
    const work = (s) => s.roots().reduce((t, g) => t + g.work, 0) || 1;
    const known = this.scenes.every((s) => measured[s.key]);
    this.weight = this.scenes.map((s) => (known ? measured[s.key] : work(s)));
    this.range = [0, 1];
    const whole = this.weight.reduce((t, v) => t + v, 0);
    this.names = this.scenes.map((s, k) => `${s.key} ${known ? seconds(this.weight[k]) + " measured" : `${((100 * this.weight[k]) / whole).toFixed(0)}% of the work`}`);
    this.text(element("span", `time: ${this.names.join(", ")}`), (this.said = element("span", "wheel to zoom")));
    this.bars = this.scenes.map((s) => this.prefix(s));
    this.listen();
    this.draw();
  }

  prefix(scene) {
    const ends = new Float64Array(scene.size + 1), c = scene.columns;
    for (let i = 0; i < scene.size; i++) ends[i + 1] = ends[i] + c.work[i] * c.times[i];
    const whole = ends[scene.size] || 1;
    return ends.map((v) => v / whole);
  }

  listen() {
    this.canvas.addEventListener("wheel", (e) => {
      e.preventDefault();
      const [a, b] = this.range, at = a + (b - a) * (e.offsetX / this.canvas.clientWidth), k = Math.exp(e.deltaY * 0.002);
      const from = Math.max(0, at - (at - a) * k), to = Math.min(1, at + (b - at) * k);
      if (to - from > 1e-5) this.range = [from, to];
      this.draw();
    }, { passive: false });
    const run = (e) => this.runs?.find((r) => e.offsetX >= r.left && e.offsetX < r.right);
    this.canvas.addEventListener("pointermove", (e) => { const r = run(e); if (r) this.said.textContent = `${r.title}: ${(100 * r.share).toFixed(1)}%`; });
    this.canvas.addEventListener("click", (e) => { const r = run(e); if (r) this.go(r.scene.key, r.node); });
  }

  draw() {
    const { x, w, h, colour } = this.begin(), whole = this.weight.reduce((t, v) => t + v, 0) || 1, [a, b] = this.range;
    const px = (share) => ((share - a) / (b - a)) * w;
    let from = 0;
    this.runs = [];
    this.scenes.forEach((scene, k) => {
      const share = this.weight[k] / whole;
      for (const r of this.aggregate(scene, this.bars[k], (v) => px(from + v * share))) this.run(x, h, colour, r);
      x.fillStyle = colour.text;
      x.fillText(this.names[k], Math.max(12, px(from) + 12), 7);
      from += share;
    });
  }

  // Neighbours in the same group, at the deepest nesting that leaves runs wide enough to see.
  aggregate(scene, ends, px) {
    for (let depth = 12; depth >= 0; depth--) {
      const runs = [];
      for (let i = 0; i < scene.size; i++) {
        let g = scene.groups[scene.columns.group[i]];
        while (g.depth > depth) g = scene.groups[g.parent];
        const id = depth === 12 && px(1) - px(0) > scene.size * 4 ? ~i : g.id, last = runs[runs.length - 1];
        if (last && last.id === id) last.to = i + 1;
        else runs.push({ id, from: i, to: i + 1, scene, node: i, title: id < 0 ? scene.op(i) : scene.path(g.id).slice(1).slice(-2).join(".") || g.title });
      }
      if (depth && runs.length * 3 > px(1) - px(0)) continue;
      for (const r of runs) { r.left = px(ends[r.from]); r.right = px(ends[r.to]); r.share = ends[r.to] - ends[r.from]; }
      return runs;
    }
    return [];
  }

  run(x, h, colour, r) {
    if (r.right < 0 || r.left > this.canvas.clientWidth) return;
    this.runs.push(r);
    const palette = ["blue", "green", "purple", "yellow", "grey"];
    const name = r.title.replace(/\d+/g, "");
    let hash = 0;
    for (let i = 0; i < name.length; i++) hash = (hash * 31 + name.charCodeAt(i)) >>> 0;
    x.fillStyle = colour[palette[hash % palette.length]];
    x.globalAlpha = 0.55;
    const width = Math.max(0.4, r.right - r.left - 0.5);
    x.fillRect(r.left, 15, width, h - 18);
    x.globalAlpha = 1;
    if (width < 40) return;
    x.fillStyle = colour.text;
    x.save();
    x.beginPath(); x.rect(r.left, 15, width - 3, h - 18); x.clip();
    x.fillText(r.title, r.left + 3, 15 + (h - 18) / 2);
    x.restore();
  }
}

// Plans under several budgets: seconds over bytes, the chosen one ringed.
class Curve extends Chart {
  constructor(view, points) {
    super("curve", view);
    this.points = points;
    this.text(element("span", "time over memory; ring: this plan"));
    this.draw();
  }

  draw() {
    const { x, w, h, colour } = this.begin(), p = this.points;
    const most = (k) => Math.max(...p.map((q) => q[k])) * 1.15 || 1;
    const mx = most("bytes"), my = most("seconds");
    const at = (q) => [30 + (q.bytes / mx) * (w - 40), h - 18 - (q.seconds / my) * (h - 28)];
    x.strokeStyle = colour.line;
    x.strokeRect(30, 10, w - 40, h - 28);
    x.strokeStyle = x.fillStyle = colour.blue;
    x.lineWidth = 1.5;
    x.beginPath();
    p.forEach((q, i) => (i ? x.lineTo(...at(q)) : x.moveTo(...at(q))));
    x.stroke();
    for (const q of p) {
      const [cx, cy] = at(q);
      x.beginPath(); x.arc(cx, cy, 3, 0, 7); x.fill();
      if (q.chosen) { x.strokeStyle = colour.orange; x.lineWidth = 2; x.beginPath(); x.arc(cx, cy, 7, 0, 7); x.stroke(); }
    }
    x.fillStyle = colour.quiet;
    x.textAlign = "right";
    x.fillText(bytes(mx / 1.15), at({ bytes: mx / 1.15, seconds: 0 })[0] + 10, h - 8);
    x.fillText(`up to ${seconds(my / 1.15)}`, w - 16, 20); // no point stands there: more memory is faster
    x.textAlign = "left";
  }
}
