// Positions. A group that is open holds the boxes of its groups and operators in layers (the longest path from a
// source); levels stack their rows. Only open groups cost anything. Boxes have x, y relative to their group.

const PAD = 10, TITLE = 24, ROW = 22, GAP_X = 14, GAP_Y = 22, WRAP = 10;

class Layout {
  constructor(scene, measure) {
    this.scene = scene;
    this.measure = measure; // text -> pixels
    this.box = new Map(); // group id or ~operator -> box
    this.links = new Map(); // group id -> [{from, to, back}]
    this.lift();
    this.top = scene.roots().map((g) => this.group(g));
    let y = 0;
    for (const b of this.top) { b.x = 0; b.y = y; y += b.h + GAP_Y; }
    this.place(this.top, 0, 0);
    this.width = Math.max(0, ...this.top.map((b) => b.w));
    this.height = y;
    this.shown = this.box.size;
  }

  // Every edge goes to the innermost open group that holds both ends, between the two children that hold them.
  lift() {
    const s = this.scene, groups = s.groups, seen = new Set();
    const up = (key) => (key < 0 ? s.columns.group[~key] : groups[key].parent);
    const depth = (key) => (key < 0 ? groups[s.columns.group[~key]].depth + 1 : groups[key].depth);
    const stand = new Int32Array(s.size);
    for (let i = 0; i < s.size; i++) { const g = s.standsFor(i); stand[i] = g ? g.id : ~i; }
    for (let k = 0; k < s.edges.length; k += 2) {
      let a = stand[s.edges[k]], b = stand[s.edges[k + 1]];
      if (a === b) continue;
      while (depth(a) > depth(b)) a = up(a);
      while (depth(b) > depth(a)) b = up(b);
      while (a !== b && up(a) !== up(b)) { a = up(a); b = up(b); }
      if (a === b) continue;
      const id = `${a},${b}`;
      if (seen.has(id)) continue;
      seen.add(id);
      const at = up(a);
      if (!this.links.has(at)) this.links.set(at, []);
      this.links.get(at).push({ from: a, to: b });
    }
  }

  operator(i) {
    const b = { key: ~i, node: i, title: this.scene.op(i), x: 0, y: 0, h: ROW };
    b.w = this.measure(b.title) + 22;
    this.box.set(b.key, b);
    return b;
  }

  group(g) {
    const b = { key: g.id, group: g, title: g.title, x: 0, y: 0, kids: [], rows: 0 };
    this.box.set(b.key, b);
    b.side = sideText(g);
    const head = this.measure(b.title, true) + (b.side ? this.measure(b.side) + 10 : 0) + 34;
    if (!g.open || !this.scene.canOpen(g)) { b.w = head; b.h = ROW + 2; return b; }
    b.kids = [...g.groups.map((x) => this.group(x)), ...g.nodes.map((i) => this.operator(i))];
    const size = g.kind === "level" ? this.stack(b.kids) : this.layers(b.kids, this.links.get(g.id) || []);
    b.w = Math.max(head, size.w + 2 * PAD);
    b.h = TITLE + size.h + PAD + 4;
    const shift = g.kind === "level" ? PAD : (b.w - size.w) / 2;
    for (const k of b.kids) { k.x += shift; k.y += TITLE + 4; }
    return b;
  }

  // Levels: one under the other, in the order given, closed rows equally wide.
  stack(kids) {
    let y = 0;
    const w = Math.max(0, ...kids.map((k) => k.w));
    for (const k of kids) {
      if (!k.kids || !k.kids.length) k.w = Math.max(k.w, Math.min(w, 640));
      k.x = 0; k.y = y; y += k.h + 8;
    }
    return { w: Math.max(0, ...kids.map((k) => k.w)), h: Math.max(0, y - 8) };
  }

  layers(kids, links) {
    const first = (b) => (b.group ? b.group.first : b.node);
    kids.sort((a, b) => first(a) - first(b));
    const order = new Map(kids.map((k, i) => [k.key, i]));
    const ins = kids.map(() => []);
    for (const l of links) {
      const a = order.get(l.from), b = order.get(l.to);
      l.back = a > b; // against the order of execution: a group that is entered again
      if (!l.back) ins[b].push(a);
    }
    const depth = new Int32Array(kids.length), layers = [];
    kids.forEach((k, i) => {
      for (const p of ins[i]) depth[i] = Math.max(depth[i], depth[p] + 1);
      (layers[depth[i]] ||= []).push(i);
    });
    return this.rows(kids, ins, this.wrapped(layers));
  }

  // A layer with very many boxes becomes several rows.
  wrapped(layers) {
    const out = [];
    for (const l of layers) for (let k = 0; k < l.length; k += WRAP) out.push(l.slice(k, k + WRAP));
    return out;
  }

  // Each row under what it reads: wanted centres in order, pushed apart where they overlap.
  rows(kids, ins, rows) {
    const centre = new Float64Array(kids.length);
    let y = 0, left = Infinity, right = -Infinity;
    for (const row of rows) {
      const want = new Map(row.map((i) => [i, ins[i].length ?
        ins[i].reduce((t, p) => t + centre[p], 0) / ins[i].length : NaN]));
      const known = [...want.values()].filter((x) => !Number.isNaN(x));
      const middle = known.length ? known.reduce((t, x) => t + x, 0) / known.length : 0;
      const at = (i) => (Number.isNaN(want.get(i)) ? middle : want.get(i));
      row.sort((a, b) => at(a) - at(b) || a - b);
      let x = -Infinity, off = 0, h = 0;
      for (const i of row) {
        const k = kids[i];
        k.x = Math.max(x, at(i) - k.w / 2);
        x = k.x + k.w + GAP_X;
        off += k.x + k.w / 2 - at(i);
        h = Math.max(h, k.h);
      }
      off /= row.length;
      for (const i of row) {
        const k = kids[i];
        k.x -= off; k.y = y;
        centre[i] = k.x + k.w / 2;
        left = Math.min(left, k.x); right = Math.max(right, k.x + k.w);
      }
      y += h + GAP_Y;
    }
    for (const k of kids) k.x -= left;
    return kids.length ? { w: right - left, h: y - GAP_Y } : { w: 0, h: 0 };
  }

  // From positions inside groups to positions on the plane.
  place(boxes, dx, dy) {
    for (const b of boxes) {
      b.x += dx; b.y += dy;
      if (b.kids) this.place(b.kids, b.x, b.y);
    }
  }
}

function sideText(g) {
  const parts = [];
  if (g.note) parts.push(g.note);
  if (g.count && g.kind !== "level" && !g.open) parts.push(g.count === 1 ? "1 op" : `${g.count} ops`);
  return parts.join(" · ");
}

// Flows between rows of levels: each in a channel of its own at the right, short ones inside, labels in one column.
function layoutFlows(scene, layout) {
  const seen = (id) => {
    let found = scene.groups[id];
    for (let g = found; g; g = scene.groups[g.parent]) if (g.parent >= 0 && !scene.groups[g.parent].open) found = scene.groups[g.parent];
    return layout.box.get(found.id);
  };
  const arrows = [], ports = new Map();
  const port = (box, arrow, end) => { if (!ports.has(box)) ports.set(box, []); ports.get(box).push({ arrow, end }); };
  for (const f of scene.flows) {
    const a = seen(f.source), b = seen(f.target);
    if (!a || !b || a === b) continue;
    const arrow = { ...f, a, b };
    arrows.push(arrow); port(a, arrow, "from"); port(b, arrow, "to");
  }
  const middle = (b) => b.y + (b.kids && b.kids.length ? TITLE : b.h) / 2;
  for (const [box, list] of ports) {
    // To what is above first, the nearest on top; then to what is below, the farthest on top: so no two cross.
    const other = (p) => middle(p.end === "from" ? p.arrow.b : p.arrow.a) - middle(box);
    const turn = (p) => (other(p) < 0 ? -1 : 1) * arrows.indexOf(p.arrow);
    list.sort((p, q) => (other(p) < 0 ? 0 : 1) - (other(q) < 0 ? 0 : 1) || other(q) - other(p) || turn(p) - turn(q));
    const height = box.kids && box.kids.length ? TITLE : box.h;
    list.forEach((p, i) => { p.arrow[p.end] = box.y + (height * (i + 1)) / (list.length + 1); });
  }
  const span = (a) => Math.abs(a.from - a.to);
  const taken = [], base = layout.width + 18;
  for (const a of [...arrows].sort((p, q) => span(p) - span(q))) {
    const low = Math.min(a.from, a.to) - 3, high = Math.max(a.from, a.to) + 3;
    let k = taken.findIndex((rows) => rows.every(([lo, hi]) => high < lo || low > hi));
    if (k < 0) k = taken.push([]) - 1;
    taken[k].push([low, high]);
    a.x = base + 13 * k;
  }
  const label = base + 13 * taken.length + 14;
  let y = -Infinity;
  for (const a of arrows.sort((p, q) => p.from + p.to - q.from - q.to)) {
    a.anchor = (a.from + a.to) / 2;
    a.labelX = label;
    a.labelY = y = Math.max(y + 17, a.anchor);
  }
  layout.flowWidth = label + Math.max(0, ...arrows.map((a) => layout.measure(a.label))) + 8;
  return arrows;
}
