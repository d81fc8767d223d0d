"""Style sheet and script of the report page. Both stay free of `<` and `&`, so that the page is valid XML, too."""

LIGHT = ("#6b7280", "#1d4ed8", "#c2410c", "#047857", "#7e22ce", "#be123c", "#0e7490", "#854d0e")
DARK = ("#9ca3af", "#7aa2ff", "#fb923c", "#34d399", "#c084fc", "#fb7185", "#22d3ee", "#facc15")


def _colors(values: tuple[str, ...]) -> str:
    return " ".join(f"--s{i}: {value};" for i, value in enumerate(values))


_STYLES = "\n".join(f".s{i} {{ --c: var(--s{i}); }}" for i in range(len(LIGHT)))

CSS = (
    f"""
:root {{
  color-scheme: light dark;
  --bg: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #57606a; --rule: #d5dae0; --link: #1d4ed8;
  --up: #047857; --down: #b42318; {_colors(LIGHT)}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --bg: #14171b; --card: #1d2127; --ink: #e8eaed; --soft: #a3abb5; --rule: #363c45; --link: #8ab0ff;
    --up: #4ade80; --down: #ff8a80; {_colors(DARK)}
  }}
}}
"""
    + _STYLES
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.25rem; margin: 44px 0 8px; padding-top: 8px; }
h3 { font-size: 1rem; margin: 22px 0 6px; }
p { max-width: 72ch; margin: 6px 0 12px; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 3px; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.skip { position: absolute; left: -999px; }
.skip:focus { left: 12px; top: 8px; background: var(--bg); padding: 6px 10px; }
nav ul, .legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0; margin: 12px 0; }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--link); padding: 2px 0 2px 14px; margin: 16px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 6px 0 16px;
  font-size: .93rem; }
caption { text-align: left; padding: 6px 0; }
th, td { padding: 7px 8px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { font-size: .85rem; color: var(--soft); font-weight: 600; }
tbody th { font-weight: 600; }
.up { color: var(--up); } .down { color: var(--down); }
.notes { color: var(--soft); font-size: .9rem; padding-left: 20px; max-width: 80ch; }
.swatch { display: inline-block; width: .85em; height: .85em; border-radius: 3px; border: 1px solid var(--rule);
  vertical-align: -1px; margin-right: 6px; }
.sample { width: 30px; height: 10px; margin-right: 7px; vertical-align: middle; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; }
.card h3 { margin: 0 0 2px; }
.charts figure { display: flex; flex-direction: column; }
.charts svg { width: 100%; height: auto; display: block; margin-top: auto;
  padding-top: 8px; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .curve { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
svg .dot { fill: var(--c); }
.classes { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 14px; }
.bar { display: grid; grid-template-columns: minmax(0, 7.4em) 1fr 2.4em 2.9em; gap: 7px; align-items: center;
  font-size: .88rem; font-variant-numeric: tabular-nums; margin: 3px 0; }
.bar .name { line-height: 1.2; overflow-wrap: anywhere; }
.bar .figure { text-align: right; }
.track { display: block; height: 12px; background: var(--rule); border-radius: 3px; overflow: hidden; }
.fill { display: block; height: 100%; background: var(--c); }
.shots { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px; }
.shot { margin: 0 0 14px; }
.shots figure { max-width: 260px; }
.shots button { display: block; width: 100%; padding: 0; border: 1px solid var(--rule); background: none;
  border-radius: 6px; overflow: hidden; cursor: zoom-in; }
.shots img { display: block; width: 100%; height: auto; }
.mask { image-rendering: pixelated; }
.shots figcaption { line-height: 1.3; margin-top: 4px; }
.shots figcaption b { display: block; font-weight: 600; color: var(--ink); }
dialog { border: 1px solid var(--rule); border-radius: 12px; background: var(--bg); color: var(--ink);
  padding: 14px; max-width: 96vw; width: 760px; }
dialog::backdrop { background: rgba(0, 0, 0, .65); }
dialog img { display: block; width: 100%; max-height: 76vh; object-fit: contain; }
dialog .row { display: flex; gap: 8px; align-items: center; justify-content: space-between; margin-top: 10px;
  flex-wrap: wrap; }
dialog button { font: inherit; padding: 6px 14px; border-radius: 8px; border: 1px solid var(--rule);
  background: var(--card); color: var(--ink); cursor: pointer; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px; overflow-x: auto;
  font-size: .82rem; line-height: 1.45; }
details { margin: 8px 0; }
summary { cursor: pointer; padding: 3px 0; }
footer { color: var(--soft); font-size: .9rem; padding: 30px 20px 40px; }
@media (max-width: 640px) {
  main, header, footer { padding-left: 14px; padding-right: 14px; }
  h1 { font-size: 1.4rem; }
  .stack thead { position: absolute; left: -999px; }
  .stack tr { display: block; border-bottom: 2px solid var(--rule); padding: 8px 0; }
  .stack th, .stack td { display: flex; justify-content: space-between; gap: 12px; border: 0; padding: 2px 0; }
  .stack tbody th { font-size: 1.05rem; }
  .stack td::before { content: attr(data-name); color: var(--soft); }
  .shots { grid-template-columns: repeat(2, 1fr); }
}
@media print { nav, .skip { display: none; } }
"""
)

SCRIPT = """
(function () {
  var dialog = document.getElementById("zoom");
  var buttons = Array.prototype.slice.call(document.querySelectorAll(".shots button"));
  if (!dialog || !dialog.showModal || buttons.length === 0) { return; }
  var picture = dialog.querySelector("img"), text = dialog.querySelector("p"), at = 0;
  function show(index) {
    at = (index + buttons.length) % buttons.length;
    var image = buttons[at].querySelector("img");
    picture.src = image.src;
    picture.alt = image.alt;
    picture.className = image.className;
    text.textContent = image.alt;
  }
  buttons.forEach(function (button, index) {
    button.addEventListener("click", function () { show(index); dialog.showModal(); });
  });
  dialog.querySelector(".before").addEventListener("click", function () { show(at - 1); });
  dialog.querySelector(".after").addEventListener("click", function () { show(at + 1); });
  dialog.querySelector(".close").addEventListener("click", function () { dialog.close(); });
  dialog.addEventListener("keydown", function (event) {
    if (event.key === "ArrowLeft") { show(at - 1); }
    if (event.key === "ArrowRight") { show(at + 1); }
  });
  dialog.addEventListener("click", function (event) { if (event.target === dialog) { dialog.close(); } });
  dialog.addEventListener("close", function () { buttons[at].focus(); });
})();
"""
