// Draws the charts of the page, in the colours of light or dark.
const dark = matchMedia('(prefers-color-scheme: dark)');
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function themed(layout) {
  const change = { 'font.color': css('--ink'), 'legend.bgcolor': 'rgba(0,0,0,0)' };
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis\d*$/.test(key)) {
      for (const [name, value] of [['gridcolor', '--line'], ['zerolinecolor', '--line'], ['linecolor', '--quiet']])
        change[`${key}.${name}`] = css(value);
    }
    if (/^polar\d*$/.test(key))
      for (const axis of ['radialaxis', 'angularaxis']) change[`${key}.${axis}.gridcolor`] = css('--line');
  }
  return change;
}

const drawn = [];
for (const place of document.querySelectorAll('.chart')) {
  const { data, layout } = JSON.parse(place.querySelector('script').textContent);
  const figure = place.querySelector('div');
  drawn.push(Plotly.newPlot(figure, data, layout, { responsive: true, displaylogo: false, displayModeBar: false })
    .then(() => Plotly.relayout(figure, themed(figure.layout))));
}
dark.addEventListener('change', () => {
  for (const figure of document.querySelectorAll('.chart > div')) Plotly.relayout(figure, themed(figure.layout));
});
Promise.all(drawn).then(() => { document.body.dataset.drawn = drawn.length; });
