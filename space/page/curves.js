// A curve over the layers, drawn by views.curves: a point is dragged, or moved by the keys of a slider. What comes of it is
// told as an event "input" with the numbers of all points.
let held = null, at = -1, later = 0;
const points = () => [...element.querySelectorAll('circle')];
const numbers = () => points().map(point => Number(point.getAttribute('aria-valuenow')));
const scale = () => JSON.parse(element.querySelector('svg').dataset.scale);

function draw(point, value) {
  const { low, high, step, top, height } = scale();
  const now = Number((Math.round(Math.min(high, Math.max(low, value)) / step) * step).toFixed(6));
  point.setAttribute('aria-valuenow', now);
  point.setAttribute('cy', (top + height - (now - low) / (high - low) * height).toFixed(1));
  const line = element.querySelector('polyline');
  line.setAttribute('points', points().map(each => `${each.getAttribute('cx')},${each.getAttribute('cy')}`).join(' '));
  held = numbers();
}

function send() {
  clearTimeout(later);
  if (!held) return;
  trigger('input', { numbers: held.join(', ') });
  held = null;
}

element.addEventListener('pointerdown', event => {
  const point = event.target.closest('circle');
  if (!point) return;
  event.preventDefault();
  point.focus();
  point.setPointerCapture(event.pointerId);
  const { low, high, top, height } = scale();
  const drag = moved => {
    const { top: upper, height: shown } = point.ownerSVGElement.getBoundingClientRect();
    const y = (moved.clientY - upper) / shown * point.ownerSVGElement.viewBox.baseVal.height;
    draw(point, low + (top + height - y) / height * (high - low));
  };
  point.addEventListener('pointermove', drag);
  for (const end of ['pointerup', 'pointercancel'])
    point.addEventListener(end, () => { point.removeEventListener('pointermove', drag); send() }, { once: true });
});

element.addEventListener('keydown', event => {
  const point = event.target.closest('circle');
  if (!point) return;
  const { low, high, step } = scale(), now = Number(point.getAttribute('aria-valuenow'));
  const to = {
    ArrowUp: now + step, ArrowRight: now + step, ArrowDown: now - step, ArrowLeft: now - step,
    PageUp: now + 10 * step, PageDown: now - 10 * step, Home: low, End: high,
  }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  draw(point, to);
  clearTimeout(later);
  later = setTimeout(send, 200);
});

element.addEventListener('focusin', event => { at = points().indexOf(event.target) });
element.addEventListener('focusout', event => { if (event.target.isConnected) at = -1 });
watch('value', () => {  // drawn anew by what was sent: what was moved since is moved again
  const now = held;
  if (now) points().forEach((point, number) => draw(point, now[number]));
  if (at >= 0 && document.activeElement === document.body) points()[at]?.focus();
});
