"use strict";
const plots = JSON.parse(document.getElementById("plots").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const touched = matchMedia("(pointer: coarse), (max-width: 700px)");

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// In figures a colour is the name of a CSS variable; text that looks like one, such as a run's name, is not a colour.
function painted(value, key) {
  if (Array.isArray(value)) return value.map((each) => painted(each, key));
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, painted(each, name)]));
  }
  return typeof value === "string" && value.startsWith("--") && /color(scale)?$/.test(key) ? variable(value) : value;
}

function axis(own) {
  const line = variable("--line");
  return {
    automargin: true, gridcolor: line, linecolor: line, zerolinecolor: line, ticks: "", fixedrange: touched.matches,
    ...own, title: { standoff: 8, ...own.title },
  };
}

function layout(own) {
  return {
    autosize: true, showlegend: false, dragmode: touched.matches ? false : "zoom", hovermode: "closest", bargap: 0.35,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: variable("--ink") },
    hoverlabel: { bgcolor: variable("--card"), bordercolor: variable("--line"), align: "left", namelength: -1, font: { color: variable("--ink") } },
    ...own,
    margin: { l: 8, r: 14, t: 8, b: 8 },
    xaxis: axis(own.xaxis ?? {}),
    yaxis: axis(own.yaxis ?? {}),
  };
}

function draw(node) {
  const { data, layout: own } = painted(plots[node.dataset.plot], "");
  return Plotly.react(node, data, layout(own), { displayModeBar: false, responsive: true, showTips: false });
}

// What is folded is drawn when it is opened: a page of many runs has many plots.
const shown = () => [...document.querySelectorAll(".plot")].filter((node) => !node.closest("details:not([open])"));

async function drawAll() {
  await Promise.all(shown().map(draw));
  document.documentElement.dataset.drawn = "yes";
}

for (const fold of document.querySelectorAll("details")) fold.addEventListener("toggle", drawAll);
dark.addEventListener("change", drawAll);
touched.addEventListener("change", drawAll);
drawAll();
