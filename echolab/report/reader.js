// The rollout reader: the rollouts of a group side by side, their tokens coloured by entropy or by -log p.
//
//   new EcholabReader(element, source, {permalinks: true})
//
// A source has
//   find({words, run, kind, outcome}), a promise of {groups, total}: entries as report/sample.py writes them,
//   load(id), a promise of a group as report/rollouts.py writes it, or of null,
//   absent(id), what to say of a group that it does not hold,
//   runs, kinds ([kind, word]), and scale {entropy, surprise, fork, segment} in nats.
// One that holds more groups than a list can show has also
//   sorts ([value, word]) and columns: then `find` is given sort, where (a condition in SQL) and page, too, and its promise
//   has found (how many there are on all pages), page and pages,
//   all(id), a promise of a group with all its rollouts, and whole(id, rollout), of a rollout that is cut in its group.
// Its promises may fail: the error's message is shown. After it has changed, `renew()` offers its runs, kinds and colours.
// What models wrote goes through textContent only; signs for what cannot be seen are CSS, and no part of the text.
"use strict";
(() => {
  const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  const CODE = new Uint8Array(128);
  [...LETTERS].forEach((letter, i) => (CODE[letter.charCodeAt(0)] = i));
  const STEP = 0.004, NOTHING = 4095, LEVELS = 8;
  const CHUNK = 400, PLAIN = 2000; // tokens; characters of a text without tokens
  const MOST_HITS = 2000, LONG_PROMPT = 700;
  const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/;
  const MODES = [
    ["entropy", "e", "entropy", "entropy of the next-token distribution at each token"],
    ["surprise", "s", "\u2212log p", "how unlikely each token was"],
    ["forks", "f", "top 20%", "the fifth of the tokens that has the highest entropy"],
    ["plain", "w", "plain", "without colours"],
  ];
  const KEYS = [
    ["j  k", "next and previous group"],
    ["l  h", "next and previous rollout; also \u2192 and \u2190"],
    ["p", "to the segment of highest entropy (dotted)"],
    ["c", "to the end of the EchoClip (underlined)"],
    ["d", "to where the rollout leaves the first one (a bar)"],
    ["e  s  f  w", "colours: entropy, \u2212log p, top 20%, none"],
    ["/", "search"],
    ["n  N", "next and previous match"],
    ["?", "this help"],
    ["Esc", "leave search and help"],
  ];

  const PAGE_KEYS = [["]  [", "next and previous page of groups"]];

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  const nats = (value) => value.toFixed(2);
  const number = (value) => value.toLocaleString("en-US");
  const outcomeOf = ({ success }) => (success === undefined ? "unrewarded" : success ? "right" : "wrong");
  const joined = (parts) => parts.filter(Boolean).join(" \u00b7 ");

  function unpackLengths(packed) {
    const lengths = [];
    let length = 0;
    for (let i = 0; i < packed.length; i++) {
      const code = CODE[packed.charCodeAt(i)];
      length += code;
      if (code < 63) { lengths.push(length); length = 0; }
    }
    return lengths;
  }
  function unpack(packed) {
    const values = new Float32Array(packed.length / 2);
    for (let i = 0; i < values.length; i++) {
      const code = CODE[packed.charCodeAt(2 * i)] * 64 + CODE[packed.charCodeAt(2 * i + 1)];
      values[i] = code === NOTHING ? NaN : code * STEP;
    }
    return values;
  }

  // A text in pieces (tokens, where they are known), shown in chunks. A chunk is plain text until it comes into view, then a
  // span for each piece. `marks` are [piece, class, label] of places where a new chunk has to begin.
  class Text {
    constructor(text, lengths, level, ranges = []) {
      Object.assign(this, { text, tokens: Boolean(lengths), level, hits: [] });
      this.starts = lengths ? Text.sums(lengths) : Text.plain(text);
      this.chunks = this.cut(ranges);
      this.element = make("div", { class: "text", dir: "auto", translate: "no" }, ...this.chunks.map((chunk) => chunk.element));
    }
    static sums(lengths) {
      const starts = new Uint32Array(lengths.length + 1);
      lengths.forEach((length, i) => (starts[i + 1] = starts[i] + length));
      return starts;
    }
    static plain(text) {
      const starts = [0];
      for (let at = 0; at < text.length; starts.push(at)) {
        at = Math.min(at + PLAIN, text.length);
        if (at < text.length && text.charCodeAt(at - 1) >>> 10 === 0x36) at++; // no character is split
      }
      return starts;
    }
    // `ranges`: [from, to, class] of pieces that look different.
    cut(ranges) {
      const n = this.starts.length - 1, size = this.tokens ? CHUNK : 1, bounds = new Set(ranges.flatMap(([from, to]) => [from, to]));
      for (let i = 0; i < n; i += size) bounds.add(i);
      const sorted = [...bounds.add(n)].filter((i) => i >= 0 && i <= n).sort((a, b) => a - b);
      return sorted.slice(1).map((to, i) => {
        const from = sorted[i], inside = ranges.filter((range) => from >= range[0] && to <= range[1]);
        const element = make("span", { class: ["chunk", ...inside.map((range) => range[2])].join(" ") });
        const chunk = { from, to, element, text: this };
        element.chunk = chunk;
        return this.empty(chunk);
      });
    }
    empty(chunk) {
      chunk.filled = false;
      chunk.element.textContent = this.text.slice(this.starts[chunk.from], this.starts[chunk.to]);
      return chunk;
    }
    fill(chunk) {
      chunk.filled = true;
      const spans = [];
      for (let i = chunk.from; i < chunk.to; i++) {
        if (this.starts[i] === this.starts[i + 1]) continue;
        const level = this.tokens ? this.level(i) : 0, span = make("i", { "data-t": this.tokens ? i : null, class: level ? `h${level}` : null });
        this.write(span, this.starts[i], this.starts[i + 1]);
        spans.push(span);
      }
      chunk.element.replaceChildren(...spans);
    }
    write(element, start, end) {
      let at = start;
      for (let i = this.firstHit(start); i < this.hits.length && this.hits[i][0] < end; i++) {
        const [from, to] = this.hits[i], mark = make("mark", { "data-hit": i });
        this.visible(element, this.text.slice(at, Math.max(at, from)));
        this.visible(mark, this.text.slice(Math.max(at, from), Math.min(to, end)));
        element.append(mark);
        at = Math.min(to, end);
      }
      this.visible(element, this.text.slice(at, end));
    }
    firstHit(start) {
      let low = 0, high = this.hits.length;
      while (low < high) { const middle = (low + high) >> 1; if (this.hits[middle][1] > start) high = middle; else low = middle + 1; }
      return low;
    }
    visible(element, text) {
      if (!UNSEEN.test(text)) { if (text) element.append(text); return; }
      for (const character of text) {
        const code = character.codePointAt(0);
        if (!UNSEEN.test(character)) element.append(character);
        else if (character === "\n") element.append(make("b", { class: "newline" }, character));
        else if (character === "\t") element.append(make("b", { class: "tab" }, character));
        else element.append(make("b", { class: "unseen", "data-name": `U+${code.toString(16).toUpperCase().padStart(4, "0")}` }, character));
      }
    }
    search(pattern) {
      this.hits = [];
      if (!pattern) return;
      for (const match of this.text.matchAll(pattern)) {
        this.hits.push([match.index, match.index + match[0].length]);
        if (this.hits.length === MOST_HITS) break;
      }
    }
    pieceAt(offset) {
      let low = 0, high = this.starts.length - 1;
      while (high - low > 1) { const middle = (low + high) >> 1; if (this.starts[middle] <= offset) low = middle; else high = middle; }
      return low;
    }
    chunkOf(piece) { return this.chunks.find((chunk) => chunk.to > piece) || this.chunks[this.chunks.length - 1]; }
    goTo(piece, selector = `[data-t="${piece}"]`) {
      const chunk = this.chunkOf(piece);
      if (!chunk) return;
      this.fill(chunk);
      const found = [...chunk.element.querySelectorAll(selector)], targets = found.length ? found : [chunk.element.firstElementChild || chunk.element];
      targets[0].scrollIntoView({ block: "center", inline: "nearest" });
      for (const target of targets) target.classList.add("shown");
      setTimeout(() => targets.forEach((target) => target.classList.remove("shown")), 1200);
    }
    goToHit(i) { this.goTo(this.pieceAt(this.hits[i][0]), `[data-hit="${i}"]`); }
  }

  // One rollout: who wrote it, its segments as bars, its text.
  class Column {
    constructor(reader, rollout, group, first) {
      Object.assign(this, { reader, rollout });
      this.lengths = rollout.lengths === undefined ? null : unpackLengths(rollout.lengths);
      this.entropy = unpack(rollout.entropy || "");
      this.surprise = unpack(rollout.surprise || "");
      this.text = new Text(rollout.text, this.lengths, (token) => this.level(token), this.ranges(first));
      if (this.clip) this.text.chunkOf(this.clip - 1).element.dataset.end = `EchoClip: ${number(this.clip)} tokens`;
      const left = rollout.tokens_left_out || rollout.chars_left_out;
      this.element = make("article", { class: `rollout ${rollout.role === group.role ? "" : "expert"}`, tabindex: "0",
        "data-rollout": rollout.id, "aria-label": this.title(group), onfocus: () => reader.select(this) },
        this.header(group), this.bars(), this.text.element,
        left ? make("footer", {}, `${number(left)} more ${rollout.tokens_left_out ? "tokens" : "characters"} are left out here.`,
          reader.source.whole ? make("button", { type: "button", class: "more", onclick: () => reader.unfold(this, group, first) }, "show all") : null) : null);
    }
    get clip() { return Math.min(this.rollout.clip_end ?? 0, this.lengths?.length ?? 0); }
    // Pieces of the peak, of the clip, and from where on the rollout differs from the first one.
    ranges(first) {
      const { segment_ends: ends, peak } = this.rollout, ranges = [];
      if (ends && peak !== undefined) ranges.push([peak ? ends[peak - 1] : 0, ends[peak], "peak"]);
      if (this.clip) ranges.push([0, this.clip, "clip"]);
      if (first && this.lengths) {
        const mine = this.rollout.text, other = first.text.text;
        let at = 0;
        while (at < mine.length && mine[at] === other[at]) at++;
        const starts = Text.sums(this.lengths);
        let piece = 0;
        while (piece + 1 < this.lengths.length && starts[piece + 1] <= at) piece++;
        if (at && at < mine.length) { this.fork = piece; ranges.push([piece, piece + 1, "fork"]); }
      }
      return ranges;
    }
    title(group) {
      const { role, model, run, sample, part } = this.rollout;
      if (role !== group.role) return `expert: ${(model || run).split("/").pop()}`;
      const parts = group.rollouts.some((rollout) => rollout.part > 0) && part !== undefined ? `, part ${part}` : "";
      return sample === undefined ? `rollout${parts}` : `sample ${sample}${parts}`;
    }
    header(group) {
      const r = this.rollout, outcome = outcomeOf(r);
      const facts = joined([
        outcome === "unrewarded" ? "no reward" : outcome,
        r.reward !== undefined && r.reward !== Number(r.success) && `reward ${Number(r.reward.toPrecision(4))}`,
        r.n_tokens ? `${number(r.n_tokens)} tokens` : `${number(r.n_chars ?? r.text.length)} characters`,
        r.mean_entropy !== undefined && `mean ${nats(r.mean_entropy)} nats`,
        r.finish && r.finish !== "stop" && r.finish,
        r.status && r.status !== "ok" && r.status.replace("_", " "),
      ]);
      return make("header", {}, make("span", { class: `mark ${outcome}`, "aria-hidden": true }, { right: "\u2713", wrong: "\u2717", unrewarded: "?" }[outcome]),
        make("b", {}, this.title(group)), make("span", { class: "facts" }, facts),
        r.extracted === undefined ? null : make("span", { class: "facts answer" }, `answer ${r.extracted.slice(0, 80)}`));
    }
    level(token) {
      const { mode, source: { scale } } = this.reader, value = (mode === "surprise" ? this.surprise : this.entropy)[token];
      if (mode === "plain" || !(value > 0)) return 0;
      if (mode === "forks") return value >= scale.fork ? LEVELS - 2 : 0;
      return Math.min(LEVELS, Math.floor((value / scale[mode]) * (LEVELS + 1)));
    }
    bars() {
      const { segment_entropies: entropies, peak } = this.rollout;
      if (!entropies?.length) return null;
      const highest = peak === undefined ? "" : `; number ${number(peak + 1)} is the highest, ${nats(entropies[peak])} nats`;
      return (this.canvas = make("canvas", { class: "bars", role: "img", title: "entropy of each segment; click to go there",
        "aria-label": `${number(entropies.length)} segments${highest}`,
        onclick: (event) => this.goToSegment(Math.floor((event.offsetX / this.canvas.clientWidth) * entropies.length)) }));
    }
    draw() {
      const { canvas, clip, rollout: { segment_entropies: entropies, segment_ends: ends, peak } } = this;
      if (!canvas?.clientWidth) return;
      const ratio = window.devicePixelRatio || 1, top = this.reader.source.scale.segment || 1, context = canvas.getContext("2d");
      const { color, borderTopColor, borderBottomColor } = getComputedStyle(canvas); // of a bar, of the peak, of the clip
      const width = (canvas.width = canvas.clientWidth * ratio), height = (canvas.height = canvas.clientHeight * ratio);
      const each = width / entropies.length, base = height - 3 * ratio;
      entropies.forEach((entropy, i) => {
        const tall = Math.min(1, (entropy || 0) / top) * base;
        context.fillStyle = i === peak ? borderTopColor : color;
        context.fillRect(i * each, base - tall, Math.max(1, each - (each > 3 * ratio ? ratio : 0)), tall);
      });
      context.fillStyle = borderBottomColor;
      if (clip) context.fillRect(0, height - 2 * ratio, each * (1 + ends.findIndex((end) => end >= clip)), 2 * ratio);
    }
    goToSegment(segment) {
      if (this.rollout.segment_ends) this.text.goTo(segment ? this.rollout.segment_ends[segment - 1] : 0);
    }
    // What is known of a token; of one that begins a character, also of those that end it.
    about(token) {
      const { segment_ends: ends, segment_entropies: entropies, peak } = this.rollout, lines = [];
      let last = token;
      while (this.lengths[last + 1] === 0) last++;
      for (let i = token; i <= last; i++) {
        const surprise = this.surprise[i], p = surprise > 16.37 ? "< 1e-7" : Number(Math.exp(-surprise).toPrecision(2));
        lines.push([`token ${number(i)}`, this.entropy[i] >= 0 ? `H ${nats(this.entropy[i])} nats` : "not counted", surprise >= 0 ? `p ${p}` : ""].join("   "));
      }
      if (last > token) lines.push(`these ${last - token + 1} tokens share a character`);
      const segment = ends ? ends.findIndex((end) => end > token) : -1;
      if (entropies?.[segment] != null) lines.push(`segment ${number(segment)}: ${nats(entropies[segment])} nats${segment === peak ? ", the peak" : ""}`);
      return lines;
    }
  }

  class EcholabReader {
    constructor(root, source, { permalinks = true } = {}) {
      Object.assign(this, { root, source, permalinks, mode: "entropy", columns: [], groups: [], hit: -1 });
      this.seen = new IntersectionObserver((entries) => {
        for (const { target: { chunk }, isIntersecting } of entries) if (isIntersecting !== chunk.filled) isIntersecting ? chunk.text.fill(chunk) : chunk.text.empty(chunk);
      }, { rootMargin: "600px" });
      this.build();
      document.addEventListener("keydown", (event) => this.key(event));
      window.addEventListener("resize", () => this.columns.forEach((column) => column.draw()));
      window.addEventListener("beforeprint", () => this.columns.forEach(({ text }) => text.chunks.slice(0, 40).forEach((chunk) => text.fill(chunk))));
      if (permalinks) window.addEventListener("hashchange", () => this.follow());
      this.ready = this.refresh().then(() => this.follow() || (this.groups.length ? this.open(this.groups[0].group_id, undefined, true) : null));
    }
    build() {
      const select = (label) => make("select", { "aria-label": label, onchange: () => this.refresh() });
      this.run = select("all runs");
      this.kind = select("all kinds");
      this.outcome = select("all outcomes");
      this.sort = select("sorted by");
      this.where = make("input", { type: "text", class: "where", spellcheck: "false", autocapitalize: "off", "aria-label": "condition in SQL",
        placeholder: "SQL condition, as n_success = 1 AND step > 100", onchange: () => this.refresh() });
      this.words = make("input", { type: "search", placeholder: `${this.source.sorts ? "search texts: Enter" : "search prompts and rollouts"} ( / )`, "aria-label": "search",
        oninput: () => { if (this.source.sorts && this.words.value) return; clearTimeout(this.waiting); this.waiting = setTimeout(() => this.refresh(), 200); },
        onkeydown: (event) => { if (event.key === "Enter") { clearTimeout(this.waiting); this.refresh().then(() => this.nextHit(1)); } } });
      this.modes = make("div", { class: "modes", role: "group", "aria-label": "colour of the tokens" }, ...MODES.map(([mode, key, word, title]) =>
        make("button", { type: "button", "data-mode": mode, title: `${title} (${key})`, onclick: () => this.colour(mode) }, word)));
      this.legend = make("div", { class: "legend", "aria-hidden": true });
      this.keys = make("button", { type: "button", class: "ask", title: "keys (?)", onclick: () => this.help.showModal() }, "?");
      this.bar = make("div", { class: "bar" });
      this.status = make("p", { class: "status", role: "status" });
      this.news = make("button", { type: "button", class: "news", hidden: true });
      this.list = make("ol", { class: "groups" });
      this.place = make("input", { type: "number", min: "1", "aria-label": "page", onchange: () => this.turnTo(Number(this.place.value)) });
      this.pages = make("span");
      this.pager = make("div", { class: "pager", hidden: true },
        make("button", { type: "button", title: "previous page ( [ )", onclick: () => this.turnTo(this.page - 1) }, "\u2039"), this.place, this.pages,
        make("button", { type: "button", title: "next page ( ] )", onclick: () => this.turnTo(this.page + 1) }, "\u203a"));
      this.group = make("div", { class: "group" });
      this.tip = make("div", { class: "tip", role: "tooltip", hidden: true });
      this.help = make("dialog", { class: "keys" }, make("h3", {}, "Keys"),
        make("table", {}, make("tbody", {}, ...[...KEYS, ...(this.source.sorts ? PAGE_KEYS : [])].map(([key, does]) => make("tr", {}, make("th", {}, key), make("td", {}, does))))),
        make("button", { type: "button", onclick: () => this.help.close() }, "close"));
      this.root.classList.add("reader");
      this.root.replaceChildren(this.bar,
        make("div", { class: "body" }, make("nav", { class: "side", "aria-label": "groups" }, this.status, this.news, this.list, this.pager), this.group), this.tip, this.help);
      for (const type of ["mouseover", "click"]) this.group.addEventListener(type, (event) => this.point(event));
      this.group.addEventListener("mouseleave", () => { this.tip.hidden = true; });
      this.renew();
    }
    renew() {
      const { source } = this, coloured = source.scale.entropy > 0;
      const offer = (select, values) => {
        const { value } = select, all = select === this.sort ? [] : [["", select.getAttribute("aria-label")]];
        select.replaceChildren(...[...all, ...values].map(([value, word]) => make("option", { value }, word)));
        if (value) select.value = value;
      };
      offer(this.run, source.runs.map((run) => [run, run]));
      offer(this.kind, source.kinds);
      offer(this.outcome, [["right", "right"], ["wrong", "wrong"], ["unrewarded", "without reward"]]);
      offer(this.sort, source.sorts || []);
      this.where.title = `columns: ${(source.columns || []).join(", ")}`;
      this.bar.replaceChildren(...[this.words, source.runs.length > 1 ? this.run : null, this.kind, this.outcome, ...(source.sorts ? [this.sort, this.where] : []),
        ...(coloured ? [this.modes, this.legend] : []), this.keys].filter(Boolean));
      this.colour(this.mode);
    }
    // The list anew; what is open stays open where the list has it.
    // `open`: which one to open where the list does not have what was open, its first or its last, or none.
    async refresh({ page = 1, open = "first" } = {}) {
      const words = this.words.value.trim(), asking = (this.asking = {});
      const query = { words, run: this.run.value, kind: this.kind.value, outcome: this.outcome.value };
      if (this.source.sorts) Object.assign(query, { sort: this.sort.value, where: this.where.value.trim(), page });
      this.root.setAttribute("aria-busy", "true");
      const found = await this.source.find(query).catch((error) => ({ error }));
      if (asking !== this.asking) return;
      this.root.removeAttribute("aria-busy");
      this.status.classList.toggle("wrong", Boolean(found.error));
      if (found.error) { this.status.textContent = found.error.message; return; }
      Object.assign(this, { groups: found.groups, page: found.page ?? 1, last: found.pages ?? 1 });
      this.pattern = words ? new RegExp(words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "giu") : null;
      const n = found.found ?? this.groups.length, shown = n === found.total ? "" : `${number(n)} of `;
      this.status.textContent = `${shown}${number(found.total)} group${found.total === 1 ? "" : "s"}`;
      this.pager.hidden = this.last < 2;
      this.place.value = this.page;
      this.place.max = this.last;
      this.pages.textContent = `of ${number(this.last)}`;
      this.list.replaceChildren(...this.groups.map((group) => this.item(group)));
      if (this.id === undefined) return;
      const stays = this.groups.some((group) => group.group_id === this.id), other = open === "last" ? this.groups[this.groups.length - 1] : this.groups[0];
      if (stays || open === "none") this.mark(this.id);
      if (open === "none") return;
      if (stays || other) await this.open(stays ? this.id : other.group_id, stays ? this.current?.rollout.id : undefined, true);
      else this.group.replaceChildren(make("p", { class: "absent" }, "No group is like this."));
    }
    turnTo(page, open = "first") {
      if (page >= 1 && page <= this.last) return this.refresh({ page: Math.round(page), open });
      this.place.value = this.page;
    }
    item(group) {
      const right = group.n_rewarded ? `${number(group.n_success)} of ${number(group.n_rewarded)} right` : "no rewards";
      const step = group.step === null || group.step === undefined ? "" : `step ${number(group.step)}`;
      return make("li", {}, make("a", { href: `#g/${group.group_id}`, "data-group": group.group_id, title: group.why || null,
        onclick: (event) => { event.preventDefault(); this.open(group.group_id); } },
        make("span", { class: `kind ${group.kind}`, "aria-hidden": true }),
        make("span", {}, joined([this.source.runs.length > 1 && group.run, step, right])),
        make("span", { class: "asked" }, group.asked || group.group_id.slice(0, 12))));
    }
    // `quietly`: the address stays as it is.
    async open(id, rollout, quietly = false) {
      const opening = (this.opening = {}), group = await this.source.load(id).catch((error) => ({ error }));
      if (opening !== this.opening) return;
      this.tip.hidden = true;
      this.id = id;
      this.current = null;
      this.show(group, id);
      this.mark(id);
      const column = this.columns.find((c) => c.rollout.id === rollout) || this.columns[0];
      if (column) this.select(column, { scroll: rollout !== undefined && !quietly, quietly });
    }
    mark(id) {
      for (const link of this.list.querySelectorAll("a")) link.toggleAttribute("aria-current", link.dataset.group === id);
      const here = this.list.querySelector("[aria-current]");
      if (here) this.list.scrollTop += here.getBoundingClientRect().top - this.list.getBoundingClientRect().top - this.list.clientHeight / 3;
    }
    show(group, id) {
      this.seen.disconnect();
      this.hit = -1;
      this.columns = [];
      if (!group || group.error) { this.group.replaceChildren(make("p", { class: "absent" }, group ? group.error.message : this.source.absent(id))); return; }
      const wanted = this.outcome.value;
      for (const rollout of group.rollouts) {
        const mine = rollout.role === group.role;
        if (mine && wanted && outcomeOf(rollout) !== wanted) continue;
        this.columns.push(new Column(this, rollout, group, mine && this.columns.find((column) => column.rollout.role === group.role)));
      }
      this.group.replaceChildren(this.about(group), make("div", { class: "columns" }, ...this.columns.map((column) => column.element)));
      for (const column of this.columns) this.settle(column);
    }
    // A column that stands in the page.
    settle(column) {
      column.text.search(this.pattern);
      column.text.chunks.forEach((chunk) => this.seen.observe(chunk.element));
      column.draw();
    }
    // A rollout that was cut, whole.
    async unfold(column, group, first) {
      const button = column.element.querySelector("footer button");
      button.disabled = true;
      try {
        const whole = new Column(this, await this.source.whole(group.group_id, column.rollout.id), group, first);
        const { scrollTop } = column.element;
        column.element.replaceWith(whole.element);
        whole.element.scrollTop = scrollTop;
        this.columns[this.columns.indexOf(column)] = whole;
        this.settle(whole);
        this.select(whole);
      } catch (error) { button.replaceWith(` ${error.message}`); }
    }
    // All rollouts of a group of which some are shown.
    async everyone(group) {
      const all = await this.source.all(group.group_id).catch((error) => ({ error }));
      if (this.id !== group.group_id) return;
      this.current = null;
      this.show(all, this.id);
      if (this.columns.length) this.select(this.columns[0]);
    }
    about(group) {
      const shown = group.rollouts.filter((rollout) => rollout.role === group.role).length;
      const facts = joined([group.run, group.step === null ? "" : `step ${number(group.step)}`,
        group.n_rewarded ? `${number(group.n_success)} of ${number(group.n_rewarded)} right` : "no rewards",
        shown < group.n ? `${number(shown)} of ${number(group.n)} rollouts are shown` : `${number(group.n)} rollout${group.n === 1 ? "" : "s"}`,
        group.gold ? `the answer is ${group.gold.slice(0, 200)}` : ""]);
      const word = this.source.kinds.find(([kind]) => kind === group.kind)?.[1] || group.kind;
      const why = this.groups.find((other) => other.group_id === group.group_id)?.why;
      const prompt = new Text(group.prompt, null);
      prompt.search(this.pattern);
      prompt.chunks.forEach((chunk) => prompt.fill(chunk));
      prompt.element.classList.add("prompt");
      const fold = () => { more.textContent = prompt.element.classList.toggle("folded") ? "the whole prompt" : "less"; };
      const more = make("button", { type: "button", class: "more", onclick: fold });
      if (group.prompt.length > LONG_PROMPT) fold();
      return make("div", { class: "about" }, make("p", { class: "facts" }, make("span", { class: `kind ${group.kind}`, "aria-hidden": true }),
        make("b", {}, word), ` \u00b7 ${facts}`, why && why !== word ? make("span", { class: "why" }, why) : null), prompt.element,
        more.textContent ? more : null, ...this.onwards(group, shown), group.prompt_left_out ? make("p", { class: "facts" }, `${number(group.prompt_left_out)} more characters are left out here.`) : null);
    }
    onwards(group, shown) {
      const { source } = this, button = (word, onclick) => make("button", { type: "button", class: "more", onclick }, word);
      return [
        source.all && shown < group.n ? button(`all ${number(group.n)} rollouts`, () => this.everyone(group)) : null,
        source.sorts && group.problem_id ? button("all groups of this problem", () => { this.where.value = `problem_id = '${group.problem_id}'`; this.refresh(); }) : null,
      ];
    }
    select(column, { scroll = false, quietly = false } = {}) {
      if (this.current !== column) {
        this.current?.element.classList.remove("current");
        this.current = column;
        column.element.classList.add("current");
        const address = `#g/${this.id}/${column.rollout.id}`;
        if (this.permalinks && !quietly && location.hash !== address) history.replaceState(null, "", address);
      }
      if (scroll) { column.element.focus({ preventScroll: true }); column.element.scrollIntoView({ block: "nearest", inline: "nearest" }); }
    }
    // Opens what the address names, if it names a group.
    follow() {
      const [, group, rollout] = /^#g\/(\w+)(?:\/(\w+))?/.exec(this.permalinks ? location.hash : "") || [];
      if (!group || (group === this.id && rollout === this.current?.rollout.id)) return null;
      return this.open(group, rollout).then(() => this.root.scrollIntoView({ block: "start" }));
    }
    colour(mode) {
      this.mode = mode;
      for (const button of this.modes.children) button.setAttribute("aria-pressed", button.dataset.mode === mode);
      for (const { text } of this.columns) text.chunks.filter((chunk) => chunk.filled).forEach((chunk) => text.fill(chunk));
      const { scale } = this.source, levels = mode === "forks" ? [LEVELS - 2] : [...Array(LEVELS + 1).keys()];
      const top = mode === "surprise" ? scale.surprise : scale.entropy;
      this.legend.hidden = mode === "plain";
      this.legend.replaceChildren(mode === "forks" ? `\u2265 ${nats(scale.fork)} nats` : "0", ...levels.map((level) => make("span", { class: `h${level}` })), mode === "forks" ? "" : `\u2265 ${nats(top || 0)} nats`);
    }
    point(event) {
      const span = event.target.closest?.("[data-t]"), column = span && this.columns.find((c) => c.element.contains(span));
      this.tip.hidden = !column;
      if (!column) return;
      this.tip.replaceChildren(...column.about(Number(span.dataset.t)).map((line) => make("div", {}, line)));
      const box = span.getBoundingClientRect(), below = box.bottom + this.tip.offsetHeight + 8 < innerHeight;
      this.tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - this.tip.offsetWidth - 8))}px`;
      this.tip.style.top = `${below ? box.bottom + 4 : box.top - this.tip.offsetHeight - 4}px`;
    }
    nextHit(by) {
      const hits = this.columns.flatMap((column) => column.text.hits.map((_, i) => [column, i]));
      if (!hits.length) return;
      this.hit = this.hit < 0 && by < 0 ? hits.length - 1 : (this.hit + by + hits.length) % hits.length;
      const [column, i] = hits[this.hit];
      this.select(column, { scroll: true });
      column.text.goToHit(i);
    }
    step(by) {
      const next = this.groups.findIndex((group) => group.group_id === this.id) + by;
      if (this.groups[next]) this.open(this.groups[next].group_id);
      else if (this.last > 1) this.turnTo(this.page + by, by < 0 ? "last" : "first");
    }
    turn(by) {
      const next = this.columns[this.columns.indexOf(this.current) + by];
      if (next) this.select(next, { scroll: true });
    }
    // Keys count while the reader is in use, or fills most of the window.
    get awake() {
      const box = this.root.getBoundingClientRect();
      return this.root.contains(document.activeElement) || (box.top < innerHeight * 0.6 && box.bottom > innerHeight * 0.4);
    }
    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey || this.help.open) return;
      const writing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName);
      if (event.key === "Escape" && (writing || this.words.value)) { this.words.value = ""; document.activeElement.blur(); this.refresh(); }
      if (writing || !this.awake) return;
      const { current } = this, does = {
        j: () => this.step(1), k: () => this.step(-1), l: () => this.turn(1), h: () => this.turn(-1),
        ArrowRight: () => this.turn(1), ArrowLeft: () => this.turn(-1), n: () => this.nextHit(1), N: () => this.nextHit(-1),
        p: () => current?.rollout.peak !== undefined && current.goToSegment(current.rollout.peak),
        c: () => current?.clip && current.text.goTo(current.clip - 1), d: () => current?.fork !== undefined && current.text.goTo(current.fork),
        "]": () => this.turnTo(this.page + 1), "[": () => this.turnTo(this.page - 1), "/": () => { this.words.focus(); this.words.select(); }, "?": () => this.help.showModal(),
        ...Object.fromEntries(MODES.map(([mode, key]) => [key, () => this.colour(mode)])),
      }[event.key];
      if (does) { event.preventDefault(); does(); }
    }
  }

  // Groups that the page itself holds, each in a script element of JSON.
  class EmbeddedGroups {
    constructor(index) {
      Object.assign(this, index, { read: new Map() });
    }
    async load(id) {
      if (!this.read.has(id)) {
        const element = document.getElementById(`g-${id}`);
        this.read.set(id, element && JSON.parse(element.textContent));
      }
      return this.read.get(id);
    }
    async find({ words, run, kind, outcome }) {
      const wanted = words.toLowerCase(), groups = [];
      for (const group of this.groups) {
        if ((run && group.run !== run) || (kind && group.kind !== kind) || (outcome && !group.outcomes.includes(outcome))) continue;
        if (wanted) {
          const { prompt, rollouts } = await this.load(group.group_id);
          if (![prompt, ...rollouts.map((rollout) => rollout.text)].some((text) => text.toLowerCase().includes(wanted))) continue;
        }
        groups.push(group);
      }
      return { groups, total: this.groups.length };
    }
    absent(id) {
      return `Group ${id} is not in this page. Python shows it: echolab.open("STORE").reader("${id}")`;
    }
  }

  Object.assign(window, { EcholabReader, EmbeddedGroups });
})();
