// Draws the plots in the page's colours, and makes tables sortable. No library but plotly, nothing is loaded.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const hidden = new Map(); // plots of one run share a legend: the run's element -> hidden settings
  const plots = () => [...document.querySelectorAll(".plot")];
  const owner = (element) => element.closest("details.run") || document.body;

  // Names such as "@ink" become the page's colours of the moment.
  function themed(value, style) {
    if (typeof value === "string" && value[0] === "@") {
      return style.getPropertyValue("--" + value.slice(1)).trim() || value;
    }
    if (Array.isArray(value)) return value.map((item) => themed(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
    }
    return value;
  }

  function draw(div) {
    if (!div.clientWidth) return; // in a run that is folded up
    const figure = themed(figures[div.dataset.figure], getComputedStyle(root));
    const off = hidden.get(owner(div)) || new Set();
    for (const trace of figure.data) trace.visible = !off.has(trace.legendgroup);
    figure.layout.width = div.clientWidth;
    figure.layout.dragmode = matchMedia("(pointer: fine)").matches ? "zoom" : false;
    Plotly.react(div, figure.data, figure.layout, { displayModeBar: false, responsive: false });
  }
  const drawAll = () => plots().forEach(draw);

  // Numbers by size, words by alphabet; empty cells stay at the end either way.
  function sort(table, column, ascending) {
    const body = table.tBodies[0];
    const key = (row) => row.cells[column].dataset.sort;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const numeric = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      const difference = numeric ? x - y : x.localeCompare(y);
      return ascending ? difference : -difference;
    };
    body.append(...[...body.rows].sort(order));
    [...table.tHead.rows[0].cells].forEach((cell, index) => {
      if (index === column) cell.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      else cell.removeAttribute("aria-sort");
    });
  }

  document.querySelectorAll("table.trials").forEach((table) => {
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      cell.firstElementChild.addEventListener("click", () => {
        sort(table, column, cell.getAttribute("aria-sort") !== "ascending");
      });
    });
  });

  document.querySelectorAll(".legend button").forEach((button) => {
    button.addEventListener("click", () => {
      const run = owner(button);
      const off = hidden.get(run) || new Set();
      const key = button.dataset.setting;
      if (!off.delete(key)) off.add(key);
      hidden.set(run, off);
      document.querySelectorAll(".legend button").forEach((other) => {
        if (owner(other) === run) other.setAttribute("aria-pressed", String(!off.has(other.dataset.setting)));
      });
      plots().filter((div) => owner(div) === run).forEach(draw);
    });
  });

  document.querySelectorAll("button.copy").forEach((button) => {
    button.addEventListener("click", async () => {
      const code = button.parentElement.nextElementSibling;
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code); // where the browser forbids it: one key is left to press
      }
    });
  });

  document.querySelectorAll("details.run").forEach((run, index) => {
    run.addEventListener("toggle", () => plots().filter((div) => owner(div) === run).forEach(draw));
    if (location.hash === "#" + run.id) run.open = true;
  });

  let pending = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(drawAll);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  // Paper is white, as wide as A4, and shows what is folded up.
  let folded = [];
  addEventListener("beforeprint", () => {
    root.dataset.print = "";
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((details) => { details.open = true; });
    drawAll();
  });
  addEventListener("afterprint", () => {
    delete root.dataset.print;
    folded.forEach((details) => { details.open = false; });
    drawAll();
  });

  drawAll();
})();
