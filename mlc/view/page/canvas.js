// The picture: draws what is in sight of a laid-out scene, pans, zooms, and finds what is under the pointer.

const FONT = "12px system-ui, 'Segoe UI', Helvetica, Arial, sans-serif";
const BOLD = "600 " + FONT;
const FATE = { kept: ["blue", 2.5, []], saved: ["blue", 3.5, []], recomputed: ["orange", 1.5, [4, 2]],
  result: ["green", 2.5, []], view: ["line", 1, [1, 2]], freed: ["line", 1, []] };
const FLOW = { value: ["text", 1.5, []], response: ["blue", 3, []], gradient: ["green", 2, []],
  stop: ["orange", 1.5, [4, 3]] };
const HEAVY = /^(mm|bmm|addmm|baddbmm|convolution|scaled_dot|linear|conv)/;

class View {
  constructor(canvas, tip) {
    this.canvas = canvas;
    this.tip = tip;
    this.context = canvas.getContext("2d");
    this.widths = new Map();
    this.at = { x: 20, y: 20, scale: 1 };
    this.selected = null; // key of a box
    this.hits = new Set();
    this.onselect = () => {};
    this.ontoggle = () => {};
    this.colours();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.colours(); this.draw(); });
    new ResizeObserver(() => this.draw()).observe(canvas);
    this.listen();
  }

  colours() {
    const style = getComputedStyle(document.documentElement);
    this.colour = new Proxy({}, { get: (_, name) => style.getPropertyValue(`--${name}`).trim() });
    const names = ["back", "box", "line", "text", "quiet", "edge", "depth0", "depth1", "depth2", "mark", "blue", "orange",
      "green", "purple", "grey", "yellow", "panel"];
    this.colour = Object.fromEntries(names.map((n) => [n, style.getPropertyValue(`--${n}`).trim()]));
  }

  measure(text, bold = false) {
    const key = (bold ? "b" : "n") + text;
    let w = this.widths.get(key);
    if (w === undefined) {
      this.context.font = bold ? BOLD : FONT;
      w = this.context.measureText(text).width;
      this.widths.set(key, w);
    }
    return w;
  }

  // Lay a scene out and draw it; `keep` is a box key that stays where it is on the screen.
  show(scene, keep = null) {
    const before = keep === null ? null : this.layout?.box.get(keep);
    this.scene = scene;
    this.layout = new Layout(scene, (t, b) => this.measure(t, b));
    this.arrows = layoutFlows(scene, this.layout);
    const after = keep === null ? null : this.layout.box.get(keep);
    if (before && after) {
      this.at.x += (before.x - after.x) * this.at.scale;
      this.at.y += (before.y - after.y) * this.at.scale;
    }
    this.draw();
  }

  fit() {
    const { clientWidth: w, clientHeight: h } = this.canvas, l = this.layout;
    const width = this.arrows.length ? l.flowWidth : l.width;
    const scale = Math.min(1.25, Math.max(0.02, Math.min((w - 40) / width, (h - 40) / l.height)));
    const readable = Math.max(scale, Math.min(1, (w - 40) / width), 0.35);
    const top = l.height * readable > h - 40;
    this.at = { scale: readable, x: Math.max(20, (w - width * readable) / 2), y: top ? 20 : (h - l.height * readable) / 2 };
    this.draw();
  }

  centre(key, scale = Math.max(this.at.scale, 0.9)) {
    const b = this.layout.box.get(key);
    if (!b) return;
    const { clientWidth: w, clientHeight: h } = this.canvas;
    this.at = { scale, x: w / 2 - (b.x + b.w / 2) * scale, y: h / 2 - (b.y + Math.min(b.h, h / scale) / 2) * scale };
    this.draw();
  }

  // ---- drawing

  draw() {
    if (!this.layout) return;
    const c = this.canvas, ratio = devicePixelRatio || 1, w = c.clientWidth, h = c.clientHeight;
    if (c.width !== Math.round(w * ratio)) c.width = Math.round(w * ratio);
    if (c.height !== Math.round(h * ratio)) c.height = Math.round(h * ratio);
    const x = this.context, { scale } = this.at;
    x.setTransform(ratio, 0, 0, ratio, 0, 0);
    x.fillStyle = this.colour.back;
    x.fillRect(0, 0, w, h);
    x.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * this.at.x, ratio * this.at.y);
    this.sight = { left: -this.at.x / scale, top: -this.at.y / scale, right: (w - this.at.x) / scale, bottom: (h - this.at.y) / scale };
    x.textBaseline = "middle";
    this.words = scale > 0.3;
    for (const b of this.layout.top) this.box(b, 0);
    for (const a of this.arrows) this.flow(a);
    this.highlight();
  }

  hidden(b) {
    const s = this.sight;
    return b.x > s.right || b.x + b.w < s.left || b.y > s.bottom || b.y + b.h < s.top;
  }

  box(b, depth) {
    if (this.hidden(b)) return;
    if (b.group) this.group(b, depth);
    else this.operator(b);
  }

  group(b, depth) {
    const x = this.context, g = b.group, open = b.kids.length > 0;
    x.fillStyle = open ? [this.colour.depth0, this.colour.depth1, this.colour.depth2][Math.min(depth, 2)] : this.colour.box;
    x.strokeStyle = this.colour[g.kind === "meta" ? "purple" : "line"];
    x.lineWidth = g.kind === "level" || g.kind === "meta" ? 1.6 : 1;
    x.setLineDash(g.kind === "loop" ? [6, 3] : []);
    rounded(x, b.x, b.y, b.w, b.h, 4);
    x.setLineDash([]);
    if (this.hits.has(b.key)) this.ring(b);
    if (this.words) this.title(b, open);
    if (!open) return;
    if (g.kind !== "level") for (const l of this.layout.links.get(b.key) || []) this.link(l);
    for (const k of b.kids) this.box(k, depth + 1);
  }

  title(b, open) {
    const x = this.context, y = b.y + (open ? TITLE / 2 + 1 : b.h / 2);
    x.fillStyle = this.colour.text;
    x.font = BOLD;
    const mark = this.scene.canOpen(b.group) ? (open ? "▾ " : "▸ ") : "  ";
    x.fillText(mark + b.title, b.x + 7, y);
    if (!b.side) return;
    x.fillStyle = this.colour.quiet;
    x.font = FONT;
    x.fillText(b.side, b.x + 7 + this.measure(mark + b.title, true) + 7, y);
  }

  operator(b) {
    const x = this.context, s = this.scene, fate = s.fate(b.node);
    const [colour, width, dash] = FATE[fate ? fate[0] : "freed"];
    x.fillStyle = this.colour.box;
    x.strokeStyle = this.colour[colour];
    x.lineWidth = width;
    x.setLineDash(dash);
    rounded(x, b.x, b.y, b.w, b.h, 3);
    x.setLineDash([]);
    if (HEAVY.test(b.title)) { x.fillStyle = this.colour.yellow; x.fillRect(b.x + 3, b.y + 4, 4, b.h - 8); }
    if (this.words) {
      x.fillStyle = this.colour.text;
      x.font = FONT;
      x.fillText(b.title, b.x + 11, b.y + b.h / 2 + 0.5);
    }
    if (this.hits.has(b.key)) this.ring(b);
  }

  ring(b) {
    const x = this.context;
    x.strokeStyle = this.colour.mark;
    x.lineWidth = 2.5;
    x.strokeRect(b.x - 2.5, b.y - 2.5, b.w + 5, b.h + 5);
  }

  link(l) {
    const a = this.layout.box.get(l.from), b = this.layout.box.get(l.to), s = this.sight;
    const top = Math.min(a.y, b.y), bottom = Math.max(a.y + a.h, b.y + b.h);
    if (top > s.bottom || bottom < s.top || this.at.scale < 0.12) return;
    const gap = b.y - a.y - a.h, beside = Math.abs(a.x + a.w / 2 - b.x - b.w / 2) < 80;
    const side = l.back ? 1 : gap > 66 && beside ? -1 : 0; // past other boxes: round them, at the right or at the left
    const far = side || gap > 240;
    this.curve(a, b, side, far ? this.colour.line : this.colour.edge, 1, far ? [3, 3] : []);
  }

  // Down from one box to another (side 0), or out at one side of both and in again.
  curve(a, b, side, colour, width, dash) {
    const x = this.context;
    x.strokeStyle = x.fillStyle = colour;
    x.lineWidth = width;
    x.setLineDash(dash);
    x.beginPath();
    if (side) {
      const edge = (k) => (side > 0 ? k.x + k.w : k.x), x1 = edge(a), x2 = edge(b), y1 = a.y + a.h / 2, y2 = b.y + b.h / 2;
      const out = (side > 0 ? Math.max(x1, x2) : Math.min(x1, x2)) + side * Math.min(40, 12 + Math.abs(y2 - y1) / 12);
      x.moveTo(x1, y1);
      x.bezierCurveTo(out, y1, out, y2, x2, y2);
      x.stroke();
    } else {
      const x1 = a.x + a.w / 2, y1 = a.y + a.h, x2 = b.x + b.w / 2, y2 = b.y, k = Math.min(40, (y2 - y1) / 2);
      x.moveTo(x1, y1);
      x.bezierCurveTo(x1, y1 + k, x2, y2 - k, x2, y2 - 4);
      x.stroke();
      x.setLineDash([]);
      x.beginPath();
      x.moveTo(x2, y2); x.lineTo(x2 - 3, y2 - 6); x.lineTo(x2 + 3, y2 - 6);
      x.fill();
    }
    x.setLineDash([]);
  }

  flow(f) {
    const x = this.context, [colour, width, dash] = FLOW[f.kind] || FLOW.value;
    const x1 = f.a.x + f.a.w, x2 = f.b.x + f.b.w;
    x.strokeStyle = x.fillStyle = this.colour[colour];
    x.lineWidth = width;
    x.setLineDash(f.dashed ? [4, 3] : dash);
    x.beginPath();
    x.moveTo(x1, f.from);
    x.lineTo(f.x, f.from); x.lineTo(f.x, f.to); x.lineTo(x2 + 7, f.to);
    x.stroke();
    x.setLineDash([]);
    x.beginPath();
    x.moveTo(x2 + 1, f.to); x.lineTo(x2 + 9, f.to - 4); x.lineTo(x2 + 9, f.to + 4);
    x.fill();
    x.globalAlpha = 0.5;
    x.lineWidth = 1;
    x.beginPath();
    x.moveTo(f.x, f.anchor); x.lineTo(f.labelX - 12, f.anchor); x.lineTo(f.labelX - 4, f.labelY);
    x.stroke();
    x.globalAlpha = 1;
    x.beginPath();
    x.arc(f.x, f.anchor, 2.5, 0, 7);
    x.fill();
    if (!this.words) return;
    x.font = FONT;
    x.fillText(f.label, f.labelX, f.labelY);
  }

  highlight() {
    const b = this.layout.box.get(this.selected);
    if (!b) return;
    this.ring(b);
    if (b.node === undefined) return;
    const { ins, outs } = this.scene.neighbours(b.node);
    const shown = (i) => { const g = this.scene.standsFor(i); return this.layout.box.get(g ? g.id : ~i); };
    for (const i of ins) this.curve(shown(i), b, 0, this.colour.mark, 1.8, []);
    for (const i of outs) this.curve(b, shown(i), 0, this.colour.mark, 1.8, [5, 2]);
  }

  // ---- pointer

  under(px, py) {
    const x = (px - this.at.x) / this.at.scale, y = (py - this.at.y) / this.at.scale;
    const inside = (b) => x >= b.x && x <= b.x + b.w && y >= b.y && y <= b.y + b.h;
    let found = null, boxes = this.layout ? this.layout.top : [];
    for (;;) {
      const b = boxes.find(inside);
      if (!b) break;
      found = b;
      boxes = b.kids || [];
    }
    if (found) return { box: found };
    const flow = this.arrows?.find((f) => x >= f.labelX && x < f.labelX + this.measure(f.label) && Math.abs(y - f.labelY) < 9);
    return flow ? { flow } : {};
  }

  listen() {
    const c = this.canvas;
    let drag = null;
    c.addEventListener("pointerdown", (e) => { drag = { x: e.clientX, y: e.clientY, moved: false }; c.setPointerCapture(e.pointerId); });
    c.addEventListener("pointermove", (e) => {
      if (!drag) { this.hover(e); return; }
      const dx = e.clientX - drag.x, dy = e.clientY - drag.y;
      if (!drag.moved && Math.abs(dx) + Math.abs(dy) < 4) return;
      this.at.x += dx; this.at.y += dy;
      drag = { x: e.clientX, y: e.clientY, moved: true };
      this.soon();
    });
    c.addEventListener("pointerup", (e) => { if (drag && !drag.moved) this.click(e.offsetX, e.offsetY); drag = null; });
    c.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    c.addEventListener("wheel", (e) => {
      e.preventDefault();
      const next = Math.min(4, Math.max(0.02, this.at.scale * Math.exp(-e.deltaY * 0.0015)));
      const k = next / this.at.scale;
      this.at = { scale: next, x: e.offsetX - (e.offsetX - this.at.x) * k, y: e.offsetY - (e.offsetY - this.at.y) * k };
      this.soon();
    }, { passive: false });
  }

  soon() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  }

  // A click on a closed group, or on the title of an open one, opens or closes it.
  click(px, py) {
    const { box } = this.under(px, py);
    this.selected = box ? box.key : null;
    const title = box?.group && (!box.kids.length || (py - this.at.y) / this.at.scale < box.y + TITLE);
    if (title && this.scene.canOpen(box.group)) {
      box.group.open = !box.group.open;
      this.ontoggle(box.group);
      this.show(this.scene, box.key);
    } else this.draw();
    this.onselect(box || null);
  }

  hover(e) {
    const { box, flow } = this.under(e.offsetX, e.offsetY), tip = this.tip;
    const lines = flow ? [[flow.label, ""], ["why", flow.detail]] : box ? describe(this.scene, box) : [];
    this.canvas.style.cursor = box || flow ? "pointer" : "grab";
    tip.hidden = !lines.length;
    if (!lines.length) return;
    tip.replaceChildren(...lines.map(([name, text]) => {
      const row = document.createElement("div");
      if (!text) { row.textContent = name; return row; }
      const b = document.createElement("b");
      b.textContent = name;
      row.append(b, " ", text);
      return row;
    }));
    const area = this.canvas.getBoundingClientRect();
    tip.style.left = `${Math.min(e.offsetX + 14, area.width - tip.offsetWidth - 4)}px`;
    tip.style.top = `${Math.min(e.offsetY + 14, area.height - tip.offsetHeight - 4)}px`;
  }
}

function rounded(x, left, top, w, h, r) {
  x.beginPath();
  x.roundRect(left, top, w, h, r);
  x.fill();
  x.stroke();
}
