"""Style and script that the page of a study adds to that of reports."""

STUDY_STYLE = """
main{max-width:1240px}
:root{--g0:#5446e0;--g1:#c2570c;--g2:#0b8a6a;--g3:#b8256b;--g4:#2374c6;--g5:#8a6d00;--g6:#7a3fb5;--g7:#5b6470;
  --g8:#a33;--g9:#397a2b}
@media(prefers-color-scheme:dark){:root{--g0:#9c92ff;--g1:#ff9d5c;--g2:#4fd1ad;--g3:#ff7fb4;--g4:#6db5ff;
  --g5:#e3c34d;--g6:#c79bff;--g7:#a9b2be;--g8:#ff8d8d;--g9:#93d37f}}
.chart{overflow-x:auto}
.chart svg{min-width:720px}
.charts .chart svg{min-width:0}
.leader{stroke:var(--soft);stroke-width:.7;opacity:.6}
.chart .label{fill:var(--ink);font-size:11px}
.chart .axis{font-size:11.5px;font-weight:600}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.key{width:10px;height:10px;border-radius:5px;margin:0 6px 0 14px;vertical-align:0}
.heat{background:color-mix(in srgb,var(--accent) var(--heat,0%),transparent)}
.none{color:var(--soft);cursor:help}
.sortable th{cursor:pointer;user-select:none}
.sortable th.by{color:var(--accent)}
.sortable{font-size:12.5px}
.sortable td,.sortable th{padding:5px 8px;line-height:1.3}
.sortable th span{max-width:84px}
.chip+br+small{display:inline-block;white-space:normal;max-width:230px}
.reasons{margin:12px 0 0;padding:16px 16px 16px 34px;font-size:13.5px}
.wide{white-space:normal;min-width:220px;max-width:300px}
.chip{font-style:normal;font-size:12px;font-weight:600;padding:2px 9px;border-radius:9px}
.chip.open{color:var(--soft);background:var(--wash)}
.strips{margin-top:12px;padding:4px 16px 12px;max-height:86vh;overflow:auto}
.strip{display:grid;grid-template-columns:minmax(130px,220px) 1fr;gap:14px;align-items:center;font-size:13px;
  padding:5px 0;border-bottom:1px solid var(--line)}
.strip:last-child{border:0}
.strip.first{position:sticky;top:0;background:var(--card);z-index:1;font-weight:600}
.strip img{width:100%;max-width:768px;image-rendering:pixelated;display:block;border-radius:6px}
""" + "".join(
    f".dot.g{i}{{fill:var(--g{i})}}.line.g{i}{{stroke:var(--g{i})}}.key.g{i}{{background:var(--g{i})}}"
    f".chart .label.g{i}{{fill:var(--g{i})}}"
    for i in range(10)
)

# sorts a table by a click on a heading, numbers from the greatest first; rows without a value come last
SCRIPT = """<script>
document.querySelectorAll(".sortable th").forEach(th => th.onclick = () => {
  const table = th.closest("table"), body = table.tBodies[0], i = th.cellIndex;
  const down = !th.classList.contains("by");
  table.querySelectorAll("th").forEach(other => other.classList.remove("by"));
  th.classList.toggle("by", down);
  const of = row => row.cells[i].dataset.value, sign = down ? -1 : 1;
  [...body.rows].sort((a, b) => {
    const x = of(a), y = of(b);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined)
      || a.cells[i].textContent.localeCompare(b.cells[i].textContent);
    return sign * (x - y);
  }).forEach(row => body.append(row));
});
</script>"""
