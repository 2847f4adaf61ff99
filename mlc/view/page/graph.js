// A scene: groups that nest, operators in them, edges between operators. Knows what is open, lays nothing out.

class Scene {
  constructor(data, tables) {
    this.key = data.key;
    this.title = data.title;
    this.tables = tables;
    this.columns = data.columns;
    this.size = data.columns.op.length;
    this.edges = data.edges;
    this.flows = data.flows.map(([source, target, kind, label, dashed, detail]) =>
      ({ source, target, kind, label, dashed, detail }));
    this.groups = data.groups.map(([parent, title, kind, note], id) => ({
      id, parent, title, kind, note, groups: [], nodes: [], depth: 0,
      count: 0, work: 0, flops: 0, largest: 0, first: Infinity, open: false,
    }));
    this.gather();
    this.openFirst();
  }

  gather() {
    const c = this.columns;
    for (const g of this.groups) {
      if (g.parent >= 0) { this.groups[g.parent].groups.push(g); g.depth = this.groups[g.parent].depth + 1; }
    }
    for (let i = 0; i < this.size; i++) {
      const g = this.groups[c.group[i]];
      g.nodes.push(i);
      g.count += 1;
      g.work += c.work[i] * c.times[i];
      g.flops += c.flops[i] * c.times[i];
      g.largest = Math.max(g.largest, c.bytes[i]);
      g.first = Math.min(g.first, i);
    }
    for (let k = this.groups.length - 1; k > 0; k--) { // a parent stands before its children
      const g = this.groups[k], up = this.groups[g.parent];
      if (!up) continue;
      up.count += g.count; up.work += g.work; up.flops += g.flops;
      up.largest = Math.max(up.largest, g.largest);
      up.first = Math.min(up.first, g.first);
    }
  }

  // At first: the outermost group, levels (few enough to read), and what is alone in its group.
  openFirst() {
    let levels = 0;
    for (const g of this.groups) {
      const up = this.groups[g.parent];
      const level = g.kind === "level" && levels++ < 12;
      const alone = up && up.open && up.kind !== "level" && up.groups.length === 1 && up.nodes.length < 8;
      g.open = g.parent < 0 || (level && up.open) || Boolean(alone && g.count < 400);
    }
  }

  roots() { return this.groups.filter((g) => g.parent < 0); }

  canOpen(g) { return g.count > 0 || g.groups.length > 0; }

  // The group or operator that stands for operator i: its outermost closed group, else itself.
  standsFor(i) {
    let found = null;
    for (let g = this.groups[this.columns.group[i]]; g; g = this.groups[g.parent]) if (!g.open) found = g;
    return found;
  }

  show(group) {
    for (let g = this.groups[group]; g; g = this.groups[g.parent]) g.open = true;
  }

  setAll(open) {
    for (const g of this.groups) g.open = open && this.canOpen(g);
    if (!open) this.openFirst();
  }

  neighbours(i) {
    const ins = [], outs = [];
    for (let k = 0; k < this.edges.length; k += 2) {
      if (this.edges[k + 1] === i) ins.push(this.edges[k]);
      if (this.edges[k] === i) outs.push(this.edges[k + 1]);
    }
    return { ins, outs };
  }

  op(i) { return this.tables.strings[this.columns.op[i]]; }
  out(i) { return this.tables.strings[this.columns.out[i]]; }
  tag(i) { return this.tables.strings[this.columns.tag[i]]; }
  reads(i) { return this.tables.strings[this.columns.reads[i]]; }
  loc(i) { return this.tables.locs[this.columns.loc[i]] || null; }
  fate(i) { return this.tables.fates[this.columns.fate[i]] || null; }

  path(group) {
    const names = [];
    for (let g = this.groups[group]; g; g = this.groups[g.parent]) names.unshift(g.title);
    return names;
  }

  // Operators that match: words must all occur; `line:38`, `module:attn`, `fate:recomputed`, `op:mm`, `tag:` look there.
  find(query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const hits = [];
    if (!words.length) return hits;
    const paths = this.groups.map((g) => this.path(g.id).join(".").toLowerCase());
    for (let i = 0; i < this.size; i++) if (words.every((w) => this.matches(i, w, paths))) hits.push(i);
    return hits;
  }

  matches(i, word, paths) {
    const [, field, value] = /^(op|line|module|fate|tag|shape):(.+)$/.exec(word) || [null, "", word];
    const loc = this.loc(i), fate = this.fate(i);
    const has = (text) => text.toLowerCase().includes(value);
    switch (field) {
      case "op": return this.op(i).toLowerCase() === value;
      case "line": return Boolean(loc) && String(loc[1]) === value;
      case "module": return paths[this.columns.group[i]].includes(value);
      case "fate": return Boolean(fate) && has(`${fate[0]} ${fate[1]}`);
      case "tag": return has(this.tag(i));
      case "shape": return has(this.out(i));
      default: return has(this.op(i)) || paths[this.columns.group[i]].includes(value) || has(this.reads(i)) ||
        (Boolean(loc) && has(loc[3]));
    }
  }
}
