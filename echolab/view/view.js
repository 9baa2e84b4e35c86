// The page of `echolab view`: the reader over all groups of a store, which come from the server, and its overview, which is
// drawn anew when the store has changed.
"use strict";
(() => {
  const EVERY = 3000; // milliseconds between two looks at the store
  const KEPT = 20; // groups that were read
  const element = (id) => document.getElementById(id);
  const number = (value) => value.toLocaleString("en-US");

  async function ask(path, given = {}, options = {}) {
    const query = new URLSearchParams(Object.entries(given).filter(([, value]) => value !== ""));
    let response;
    try { response = await fetch(`${path}?${query}`, options); }
    catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer: does `echolab view` still run?");
    }
    const said = await response.json().catch(() => ({ error: `The server answers ${response.status}.` }));
    if (!response.ok) throw new Error(said.error);
    return said;
  }

  // All groups of the store, as the reader wants them.
  class ServedGroups {
    constructor(state) { this.take(state); }
    take({ runs, kinds, scale, sorts, columns }) { Object.assign(this, { runs, kinds, scale, sorts, columns, listed: [], kept: new Map() }); }
    async find(query) {
      this.finding?.abort(); // what nobody waits for any more, the server need not look for
      this.finding = new AbortController();
      const found = await ask("groups", query, { signal: this.finding.signal });
      this.listed = found.groups.map((group) => group.group_id);
      return found;
    }
    // Who opens a group opens the next one next.
    async load(id) {
      const group = await this.read(id), next = this.listed[this.listed.indexOf(id) + 1];
      if (next) this.read(next).catch(() => {});
      return group;
    }
    read(id) {
      if (!this.kept.has(id)) {
        if (this.kept.size >= KEPT) this.kept.delete(this.kept.keys().next().value);
        this.kept.set(id, ask(`group/${id}`));
        this.kept.get(id).catch(() => this.kept.delete(id));
      }
      return this.kept.get(id);
    }
    all(id) { return ask(`group/${id}`, { all: "1" }); }
    whole(id, rollout) { return ask(`group/${id}`, { rollout }); }
    absent(id) { return `Group ${id} is not in this store.`; }
  }

  let reader, source, shown, drawn = null; // the states of the list and of the overview that are in the page

  function head(state) {
    const several = state.runs.length > 1 ? ` of ${number(state.runs.length)} runs` : "";
    const title = document.querySelector("#top h1");
    if (drawn === null) title.textContent = `${number(state.rollouts)} rollouts in ${number(state.groups)} groups${several}`;
    element("trouble").hidden = !state.trouble;
    element("trouble").textContent = state.trouble ? `${state.trouble[0].toUpperCase()}${state.trouble.slice(1)}. What is shown here is the last state that could be read.` : "";
  }

  // The list as it is now. What is open stays open.
  async function show(state) {
    shown = state;
    element("about").innerHTML = state.about;
    element("read").hidden = !state.groups;
    if (!state.groups) return;
    if (!reader) {
      source = new ServedGroups(state);
      reader = new EcholabReader(element("reader"), source);
      return reader.ready;
    }
    source.take(state);
    reader.news.hidden = true;
    reader.renew();
    return reader.refresh({ page: reader.page, open: "none" });
  }

  function tell(state) {
    const more = state.groups - shown.groups;
    reader.news.textContent = more > 0 ? `${number(more)} more group${more === 1 ? "" : "s"}: show` : "The store has changed: show";
    reader.news.onclick = () => show(state);
    reader.news.hidden = false;
  }

  async function draw() {
    const overview = await ask("overview");
    if (!overview) return;
    drawn = overview.edition;
    const rest = element("rest"), reading = element("reader"), before = reading.getBoundingClientRect().top;
    rest.style.minHeight = `${rest.offsetHeight}px`; // the page keeps its height meanwhile, and what is being read its place
    element("top").innerHTML = overview.parts.top;
    if (reading.matches(":hover, :focus-within")) window.scrollBy(0, reading.getBoundingClientRect().top - before);
    rest.innerHTML = overview.parts.rest;
    element("foot").innerHTML = overview.parts.foot;
    await drawCharts(overview.charts, reader);
    rest.style.minHeight = "";
  }

  async function look() {
    const state = await ask("state");
    head(state);
    if (!shown || (!reader && state.groups)) await show(state);
    else if (state.edition !== shown.edition) tell(state);
    if (state.overview !== null && state.overview !== drawn) await draw();
  }

  async function start() {
    try {
      await look();
      document.documentElement.dataset.ready = "";
    } catch (error) {
      element("trouble").hidden = false;
      element("trouble").textContent = error.message;
    }
    setTimeout(start, document.hidden ? 5 * EVERY : drawn === null ? EVERY / 6 : EVERY);
  }
  start();
})();
