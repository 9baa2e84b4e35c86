// The charts of a page: `drawCharts(specs, reader)` draws each into the element of its id, and opens what is clicked in the
// reader. The page of a report holds both and starts on its own.
"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const drawn = []; // views that are in the page
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  document.body.append(tip);

  // Vega's own tooltip writes HTML; this one writes text.
  function tell(handler, event, item, value) {
    tip.hidden = !value;
    if (!value) return;
    const lines = Object.entries(value).map(([key, said]) => {
      const line = document.createElement("div"), name = document.createElement("span");
      name.textContent = key.replaceAll("_", " ");
      line.append(name, ` ${said}`);
      return line;
    });
    tip.replaceChildren(...lines);
    tip.style.left = `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 8)}px`;
  }

  async function draw(place, spec, reader) {
    if (spec.usermeta?.width) place.style.maxWidth = `${spec.usermeta.width}px`;
    if (place.clientWidth < 500) for (const { encoding } of spec.layer || [spec])
      if (encoding.y?.axis?.labelLimit) encoding.y.axis.labelLimit = place.clientWidth * 0.4;
    const { view } = await vegaEmbed(place, spec, { ast: true, renderer: "svg", actions: false, defaultStyle: false, tooltip: tell, logLevel: 1 });
    place.dataset.drawn = "";
    drawn.push(view);
    view.addEventListener("click", (event, item) => {
      const id = item?.datum?.group_id;
      if (!id) return;
      tip.hidden = true;
      reader.open(id).then(() => reader.root.scrollIntoView({ block: "start", behavior: "smooth" }));
    });
    return view;
  }

  // The order of problems: rate, newest or change, and back.
  function sortable(place, spec, reader) {
    let view;
    const redraw = async () => { view?.finalize(); view = await draw(place, spec, reader); };
    for (const button of place.closest("figure").querySelectorAll("[data-sort]"))
      button.addEventListener("click", () => {
        const [by, order] = button.dataset.sort.split(" ");
        for (const layer of spec.layer || [spec]) layer.encoding.y.sort = by === "problem" ? "ascending" : { field: by, op: "min", order };
        for (const other of place.closest("figure").querySelectorAll("[data-sort]")) other.setAttribute("aria-pressed", other === button);
        redraw();
      });
    return redraw();
  }

  // Those that were drawn before are taken away.
  async function drawCharts(specs, reader) {
    for (const view of drawn.splice(0)) view.finalize();
    for (const [id, spec] of Object.entries(specs)) {
      const place = document.getElementById(id);
      await (place.closest("figure").querySelector("[data-sort]") ? sortable(place, spec, reader) : draw(place, spec, reader));
    }
  }

  async function start() {
    const index = document.getElementById("reader-index");
    const reader = index && new EcholabReader(document.getElementById("reader"), new EmbeddedGroups(read("reader-index")));
    await drawCharts(read("charts"), reader);
    await reader?.ready;
    document.documentElement.dataset.ready = "";
  }

  document.addEventListener("click", (event) => {
    if (event.target.id !== "theme") return;
    const { style } = document.documentElement, dark = getComputedStyle(document.body).colorScheme === "dark" || (!style.colorScheme && matchMedia("(prefers-color-scheme: dark)").matches);
    style.colorScheme = dark ? "light" : "dark";
    window.dispatchEvent(new Event("resize"));
  });
  window.drawCharts = drawCharts;
  if (document.getElementById("charts")) start();
})();
