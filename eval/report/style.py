"""The style sheet of report pages: one column of cards, light and dark."""

STYLE = """
:root{--bg:#f6f5f2;--card:#fff;--ink:#1d1d22;--soft:#6a6a74;--line:#e6e4de;--accent:#5446e0;
  --wash:#5446e014;
--good:#17805a;--goodwash:#17805a1a;--bad:#c22f4a;--badwash:#c22f4a17;
  --shadow:0 1px 2px #0000000a,0 8px 24px #0000000a}
@media(prefers-color-scheme:dark){:root{--bg:#131317;--card:#1c1c22;--ink:#ececf1;--soft:#9b9ba8;
  --line:#2d2d36;
--accent:#9c92ff;--wash:#9c92ff1f;--good:#4fc796;--goodwash:#4fc79622;--bad:#ff7d92;--badwash:#ff7d9222;
  --shadow:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
  font:15px/1.5 ui-sans-serif,system-ui,"Segoe UI",Roboto,sans-serif;
-webkit-font-smoothing:antialiased;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:56px 24px 80px}
h1{font-size:clamp(30px,5vw,46px);line-height:1.08;letter-spacing:-.025em;margin:0 0 12px;
  font-weight:700}
h2{font-size:22px;letter-spacing:-.015em;margin:56px 0 4px}
h3{font-size:15px;margin:28px 0 10px}
p{margin:0 0 16px;color:var(--soft);max-width:74ch}
header p{font-size:17px}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;box-shadow:var(--shadow)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;margin:28px 0 0}
.tile{padding:16px 18px}
.tile b{display:block;font-size:28px;letter-spacing:-.02em;line-height:1.15}
.tile b small{font-size:15px;font-weight:600;margin-left:2px}
.tile span{color:var(--soft);font-size:13px}
.tile em{display:block;font-style:normal;color:var(--soft);font-size:12px;margin-top:2px;opacity:.85}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(136px,1fr));gap:12px}
.generated{overflow:hidden;display:flex;flex-direction:column}
.generated img,.pair img,.sample img{display:block;width:100%;aspect-ratio:1;image-rendering:pixelated;
  background:var(--line)}
.generated div{padding:9px 11px 11px;font-size:12.5px;line-height:1.35;flex:1}
.generated small{display:block;color:var(--soft);font-size:11px;margin-top:4px}
.verdict{float:right;width:18px;height:18px;border-radius:9px;font:700 11px/18px system-ui;
  text-align:center;
margin:0 0 4px 6px}
.yes{color:var(--good);background:var(--goodwash)}
.no{color:var(--bad);background:var(--badwash)}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(208px,1fr));gap:12px}
.pair{overflow:hidden}
.pair div{display:grid;grid-template-columns:1fr 1fr;gap:2px}
.pair footer{display:flex;justify-content:space-between;padding:7px 11px;font-size:12px;
  color:var(--soft)}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:12px}
.sample{display:grid;grid-template-columns:104px 1fr;overflow:hidden}
.sample div{padding:11px 13px;font-size:13.5px;line-height:1.35}
.sample q{quotes:none;display:block;margin-bottom:7px}
.sample b{font-size:15px}
.sample s{color:var(--bad);font-weight:600}
.generated img,.sample img{font-size:10.5px;line-height:1.3;color:var(--soft);overflow-wrap:anywhere}
.sample small{display:block;color:var(--soft);font-size:11px;margin-top:5px}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:16px}
.panel{padding:18px 20px}
.panel h3{margin:0 0 12px}
.bar{display:grid;grid-template-columns:minmax(96px,24%) 1fr 48px;gap:4px 12px;align-items:center;
  font-size:13px;
  padding:5px 0}
.bar span{line-height:1.2;overflow-wrap:anywhere}
.bar b{text-align:right}
.bar small{grid-column:2/4;color:var(--soft);font-size:11.5px;margin-top:-2px}
.track{position:relative;height:12px;border-radius:6px;background:var(--wash)}
.track i{position:absolute;top:0;height:100%}
.fill{left:0;background:var(--accent);border-radius:6px;opacity:.85}
.track .whisker{top:5px;height:2px;background:var(--ink);opacity:.55}
.track .mark{width:3px;top:-3px;height:18px;background:var(--bad);border-radius:2px;margin-left:-1px}
.key{display:inline-block;width:3px;height:12px;background:var(--bad);border-radius:2px;
  vertical-align:-1px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:12px}
.chart{margin:0;padding:14px 14px 6px;background:var(--card);border:1px solid var(--line);
  border-radius:14px}
.chart figcaption{display:flex;justify-content:space-between;font-size:13px;padding:0 4px 4px}
.chart figcaption span{color:var(--soft)}
.chart svg{display:block;width:100%;height:auto}
.chart text{fill:var(--soft);font:10.5px system-ui}
.grid{stroke:var(--line)}
.curve{fill:none;stroke:var(--accent);stroke-width:2;stroke-linejoin:round}
.dot{fill:var(--accent)}
.raw{fill:none;stroke:var(--accent);opacity:.25}
.area{fill:var(--wash)}
.bin{fill:var(--accent);opacity:.8}
.scroll{overflow-x:auto}
.scroll th:first-child,.scroll td:first-child{position:sticky;left:0;background:var(--card)}
.scroll,.columns{margin-top:12px}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;padding:8px 14px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:500;font-size:12px;vertical-align:bottom}
th span{display:inline-block;max-width:132px;white-space:normal;overflow-wrap:break-word;line-height:1.25}
td{vertical-align:top}
td small{color:var(--soft)}
.n{text-align:right}
tr:last-child td{border:0}
.sub{padding-left:18px;color:var(--soft)}
details{margin-top:12px}
summary{cursor:pointer;padding:13px 18px;color:var(--soft);font-size:13px}
summary b{color:var(--ink);font-size:15px;margin-right:8px;overflow-wrap:anywhere}
details>div{padding:0 18px 18px}
details .card{box-shadow:none}
.best{color:var(--accent)}
.warn{border-left:3px solid var(--bad);padding:10px 16px;margin:12px 0}
footer.end{margin-top:56px;color:var(--soft);font-size:12.5px;word-break:break-all}
code{font:12.5px ui-monospace,Menlo,Consolas,monospace}
"""
