"use strict";
// Draws each chart in its place, in the page's colours, and again where the reader's setting changes.
(() => {
  const specs = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = [];

  // Legends begin where bars do, behind the names of these, so on a phone there is room for one column.
  function columns(spec, container) {
    const entries = (channel) => Math.max(
      ...spec.layer.map((layer) => layer.encoding[channel]?.scale?.domain.length ?? 0));
    return container.clientWidth < 480 && entries("color") + entries("strokeDash") > 3 ? 1 : 3;
  }

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const font = getComputedStyle(document.body).fontFamily;
    const category = dark.matches
      ? ["#8fb0ff", "#f2b36b", "#57c596", "#e58ac0", "#b7a4f7", "#6fcbd6", "#c9d1da"]
      : ["#2f5fd0", "#d9822b", "#1f8a5b", "#b84592", "#7556c9", "#23899a", "#7b8794"];
    return {
      background: null,
      font,
      padding: 2,
      view: { stroke: null },
      range: { category },
      axis: {
        labelColor: color("--soft"), titleColor: color("--soft"), gridColor: color("--line"),
        domainColor: color("--line"), tickColor: color("--line"), labelFontSize: 12,
        titleFontSize: 12, titleFontWeight: "normal", labelFont: font, titleFont: font,
      },
      axisY: { domain: false, ticks: false, labelPadding: 6 },
      legend: {
        orient: "top", direction: "horizontal", labelColor: color("--ink"),
        labelFontSize: 12, labelFont: font, symbolType: "circle", symbolStrokeWidth: 2,
        labelLimit: 0, offset: 8,
      },
      rule: { color: color("--ink") },
      line: { color: color("--ink") },
      text: { color: color("--ink"), fontSize: 12, font },
    };
  }

  async function draw() {
    for (const view of drawn.splice(0)) view.finalize();
    const config = theme();
    for (const [name, spec] of Object.entries(specs)) {
      const container = document.getElementById(`chart-${name}`);
      if (!container) continue;
      container.replaceChildren();
      config.legend.columns = columns(spec, container);
      const compiled = vegaLite.compile(spec, { config }).spec;
      const view = new vega.View(vega.parse(compiled), { renderer: "svg", container, hover: true });
      drawn.push(view);
      await view.runAsync();
    }
    document.documentElement.dataset.charts = "drawn";
  }

  dark.addEventListener("change", draw);
  draw();
})();
