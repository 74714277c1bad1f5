"""Style sheet and script of the page."""

CSS = """
:root { --ink: #1f2430; --muted: #5b6270; --line: #dfe3e8; --soft: #f6f7f9; --accent: #0072B2; --paper: white;
  --verdict: #eff6fb; color-scheme: light dark; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --muted: #a5adba; --line: #363d49; --soft: #1d222b; --accent: #62b5e8; --paper: #12161d;
    --verdict: #15273a; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; color: var(--ink); background: var(--paper); line-height: 1.5; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 56px 0 8px; padding-top: 16px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 28px 0 8px; }
p { max-width: 96ch; margin: 8px 0; }
a { color: var(--accent); }
.subtitle, .note, figcaption, footer { color: var(--muted); }
.note, figcaption { font-size: 14px; }
nav { margin: 18px 0 0; font-size: 14px; display: flex; flex-wrap: wrap; gap: 4px 18px; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
.verdict { margin: 24px 0; padding: 18px 22px; border-left: 5px solid var(--accent); background: var(--verdict);
  border-radius: 0 8px 8px 0; }
.verdict p { max-width: 90ch; }
.verdict p:first-child { font-size: 20px; line-height: 1.4; font-weight: 600; margin-top: 0; }
.verdict p:last-child { margin-bottom: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 19px; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere; }
.tile span { font-size: 13px; color: var(--muted); }
figure { margin: 16px 0 8px; }
figcaption { max-width: 104ch; margin-top: 6px; }
.note { max-width: 104ch; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13px; margin: 6px 0 4px; padding: 0;
  list-style: none; }
.legend li { display: flex; align-items: center; gap: 7px; }
.panels { display: grid; gap: 18px 16px; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
@media screen and (max-width: 860px) { .panels { grid-template-columns: minmax(0, 1fr); } }
.panel { min-width: 0; }
.plot, .still, .sample img { background: white; border-radius: 6px; }  /* pictures stay as they are in the dark */
.still { max-width: 100%; }
figure.drawn .still, figure:not(.drawn) .panels { display: none; }
.verdict ul { margin: 4px 0 0; }
.panel h3 { font-size: 14px; margin: 6px 0 2px; font-weight: 600; }
.panel .legend { font-size: 12px; gap: 2px 14px; margin: 2px 0; }
.scroll { overflow: auto; border: 1px solid var(--line); border-radius: 8px; margin: 12px 0; }
.scroll.tall { max-height: 520px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
thead th { background: var(--soft); font-weight: 600; position: sticky; top: 0; z-index: 1; }
th.left, td.left { text-align: left; }
td.wrap { white-space: normal; min-width: 34ch; }
tbody th { font-weight: 600; text-align: left; }
tr.part th { background: var(--soft); font-size: 12.5px; color: var(--muted); }
table.dense { font-size: 13px; }
table.dense th, table.dense td { padding: 6px 8px; }
td small { display: block; color: var(--muted); font-size: 11.5px; }
table.sortable thead th { cursor: pointer; user-select: none; }
table.sortable thead th[aria-sort=ascending]::after { content: " \\2191"; }
table.sortable thead th[aria-sort=descending]::after { content: " \\2193"; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
ul.plain { padding-left: 20px; margin: 8px 0; max-width: 100ch; font-size: 14.5px; }
ul.plain li { margin: 5px 0; }
.sample { margin: 14px 0 26px; overflow-x: auto; }
.sample img { width: 100%; min-width: 760px; height: auto; display: block; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow: auto;
  font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; max-height: 420px; }
details { margin: 12px 0; }
summary { cursor: pointer; font-weight: 600; font-size: 14.5px; }
footer { padding: 32px 24px 48px; font-size: 13px; }
@media print {
  main, header, footer { max-width: none; padding: 0; }
  nav { display: none; }
  .scroll, .scroll.tall, pre { max-height: none; overflow: visible; }
  figure, .tile, .sample, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""

DRAW = """
const draw = async () => {
  const packed = document.getElementById("plotly");
  const bytes = Uint8Array.from(atob(packed.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  packed.replaceWith(script);
  for (const figure of document.querySelectorAll("figure")) {
    figure.classList.add("drawn");  // first, as a chart takes its width from the page
    for (const values of figure.querySelectorAll("script.figure")) {
      const { data, layout } = JSON.parse(values.textContent);
      Plotly.newPlot(values.previousElementSibling, data, layout, { displayModeBar: false, responsive: true });
    }
  }
};
draw();
"""
"""Unpacks plotly.js and draws every chart; where that fails its picture stays."""

PRINT = """
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
"""
"""On paper nothing can be unfolded."""

SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const sort = (column) => {
    const up = heads[column].getAttribute("aria-sort") !== "ascending";
    const state = up ? "ascending" : "descending";
    heads.forEach((head, i) => head.setAttribute("aria-sort", i === column ? state : "none"));
    const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
    const order = (a, b) => (isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b));
    [...body.rows].sort((a, b) => (up ? order(a, b) : order(b, a))).forEach((row) => body.append(row));
  };
  heads.forEach((head, i) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(i));
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(i); });
  });
}
"""
