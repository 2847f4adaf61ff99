// Starts the page: unpacks the data, makes the scenes, joins search, panels, picture and charts.

async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

class Page {
  constructor(data) {
    this.data = data;
    this.scenes = data.scenes.map((s) => new Scene(s, data));
    const $ = (id) => document.getElementById(id);
    $("title").textContent = data.title;
    this.view = new View($("graph"), $("tip"));
    this.details = new Details($("detail"), (i) => this.go(this.view.scene.key, i));
    this.tree = new Tree($("tree"), (g) => this.toggle(g));
    this.view.onselect = (box) => { this.details.show(this.view.scene, box, data.facts); this.panels(); };
    this.view.ontoggle = () => this.panels();
    this.buttons($);
    this.hits = [];
    const wanted = new URLSearchParams(location.hash.slice(1)).get("scene");
    this.open(this.scenes.find((s) => s.key === wanted) || this.scenes[0]);
    this.charts();
  }

  charts() {
    const go = (key, i) => { if (i >= 0) this.go(key, i); };
    if (this.data.memory) {
      this.memory = new Memory(this.view, this.data, go);
      this.time = new Time(this.view, this.scenes, this.data, go);
    }
    if (this.data.curve.length > 1) this.curve = new Curve(this.view, this.data.curve);
  }

  buttons($) {
    for (const s of this.scenes) {
      const b = element("button", s.title, { type: "button", "data-scene": s.key, "aria-pressed": "false" });
      b.addEventListener("click", () => this.open(s));
      $("scenes").append(b);
    }
    const all = (open) => () => { this.view.scene.setAll(open); this.view.show(this.view.scene); this.view.fit(); this.panels(); };
    $("expand").addEventListener("click", all(true));
    $("collapse").addEventListener("click", all(false));
    $("fit").addEventListener("click", () => this.view.fit());
    $("search").addEventListener("input", (e) => this.search(e.target.value));
    $("search").addEventListener("keydown", (e) => { if (e.key === "Enter") this.next(e.shiftKey ? -1 : 1); });
    addEventListener("keydown", (e) => { if (e.key === "/" && e.target.tagName !== "INPUT") { e.preventDefault(); $("search").focus(); } });
  }

  open(scene) {
    for (const b of document.querySelectorAll("#scenes button")) b.setAttribute("aria-pressed", String(b.dataset.scene === scene.key));
    this.view.selected = null;
    this.view.show(scene);
    this.view.fit();
    this.details.show(scene, null, this.data.facts);
    this.search(document.getElementById("search").value);
  }

  toggle(g) {
    const s = this.view.scene;
    if (g.parent >= 0) s.show(g.parent);
    if (s.canOpen(g)) g.open = !g.open;
    this.view.selected = g.id;
    this.view.show(s);
    this.view.centre(g.id);
    this.details.show(s, this.view.layout.box.get(g.id), this.data.facts);
    this.panels();
  }

  // To an operator of some scene: open what it stands in, centre it, say what is known.
  go(key, i) {
    const scene = this.scenes.find((s) => s.key === key);
    if (scene !== this.view.scene) this.open(scene);
    scene.show(scene.columns.group[i]);
    this.view.selected = ~i;
    this.view.show(scene);
    this.view.centre(~i);
    this.details.show(scene, this.view.layout.box.get(~i), this.data.facts);
    this.panels();
  }

  search(query) {
    this.hits = this.view.scene.find(query);
    this.hit = -1;
    document.getElementById("hits").textContent = query ? `${this.hits.length} hits` : "";
    this.panels();
  }

  next(step) {
    if (!this.hits.length) return;
    this.hit = (this.hit + step + this.hits.length) % this.hits.length;
    this.go(this.view.scene.key, this.hits[this.hit]);
    document.getElementById("hits").textContent = `${this.hit + 1} of ${this.hits.length} hits`;
  }

  // Tree, marks of the search, counts.
  panels() {
    const { scene, layout, selected } = this.view, mark = new Set();
    for (const i of this.hits) { const g = scene.standsFor(i); mark.add(g ? g.id : ~i); }
    this.view.hits = mark;
    this.view.draw();
    this.tree.show(scene, selected);
    const shown = layout.shown, edges = scene.edges.length / 2;
    document.getElementById("status").textContent = `${scene.size} ops · ${edges} edges · ${shown} boxes shown`;
  }
}

unpack(document.getElementById("data").textContent).then((data) => {
  globalThis.mlcPage = new Page(data);
  requestAnimationFrame(() => {
    const root = document.documentElement;
    root.dataset.ready = String(Math.round(performance.now()));
  });
});
