// Replays bodies in three dimensions: the first episode on the left, the last on the right. The eye
// follows the body; dragging turns it.
for (const place of document.querySelectorAll('.replay')) {
  const { tasks, seconds, sides } = JSON.parse(place.querySelector('script').textContent);
  const canvas = place.querySelector('canvas'), pen = canvas.getContext('2d');
  const [task, play, slider] = ['select', 'button', 'input'].map(name => place.querySelector(name));
  const all = tasks.flatMap(one => one.episodes).flatMap(episode => episode.frames);
  // What moves in a plane is seen from its side; and a small body from near.
  let turn = all.every(one => one.place[1] === 0) ? -0.3 : -1.2;
  const reach = Math.max(...all.slice(0, 1).flatMap(({ place, ends }) =>
    ends.flat().map(([x, y, z]) => Math.hypot(x - place[0], y - place[1], z))));
  const view = Math.min(4.2, 2.6 * reach || 4.2);  // m from edge to edge
  let tilt = 0.3, frame = 0, playing = false, last = 0;

  function project(point, centre) {
    const x = point[0] - centre[0], y = point[1] - centre[1], z = point[2];
    const right = x * Math.cos(turn) + y * Math.sin(turn), away = -x * Math.sin(turn) + y * Math.cos(turn);
    return [right, z * Math.cos(tilt) + away * Math.sin(tilt), away * Math.cos(tilt) - z * Math.sin(tilt)];
  }

  function draw() {
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * ratio; canvas.height = height * ratio;
    pen.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const [ink, line] = ['--quiet', '--line'].map(name => style.getPropertyValue(name).trim());
    const episodes = tasks[task.value].episodes, part = width / episodes.length, size = Math.min(part, height * 1.3) / view;
    episodes.forEach((episode, side) => {
      const at = Math.min(frame, episode.frames.length - 1), now = episode.frames[at];
      const centre = now.place, left = part * (side + 0.5), floor = height * 0.72;
      const screen = point => { const [x, y] = project(point, centre); return [left + size * x, floor - size * y]; };
      pen.save();
      pen.beginPath(); pen.rect(side * part, 0, part, height); pen.clip();
      pen.lineWidth = 1; pen.strokeStyle = line;
      const first = centre.map(x => Math.floor(x) - 3);
      for (let i = 0; i <= 7; i++) for (const along of [0, 1]) {
        const ends = [0, 7].map(j => along ? [first[0] + i, first[1] + j, 0] : [first[0] + j, first[1] + i, 0]);
        pen.beginPath(); pen.moveTo(...screen(ends[0])); pen.lineTo(...screen(ends[1])); pen.stroke();
      }
      pen.strokeStyle = side ? '#d55e00' : '#2f8fd8'; pen.lineWidth = 2; pen.beginPath();
      episode.frames.slice(0, at + 1).forEach((one, i) => pen[i ? 'lineTo' : 'moveTo'](...screen([...one.place, 0])));
      pen.stroke();
      const parts = now.ends.map((ends, i) => ({ ends, radius: episode.radius[i], away: project(ends[0], centre)[2] + project(ends[1], centre)[2] }));
      pen.lineCap = 'round';
      for (const { ends, radius } of parts.sort((a, b) => b.away - a.away)) {
        for (const [color, more] of [[ink, 1.5], [side ? '#d55e00' : '#2f8fd8', 0]]) {
          pen.strokeStyle = color; pen.lineWidth = 2 * size * radius + more;
          pen.beginPath(); pen.moveTo(...screen(ends[0])); pen.lineTo(...screen(ends[1])); pen.stroke();
        }
      }
      pen.strokeStyle = ink; pen.lineWidth = 1;
      for (const box of now.corners) for (let i = 0; i < 8; i++) for (const bit of [1, 2, 4]) if (!(i & bit)) {
        pen.beginPath(); pen.moveTo(...screen(box[i])); pen.lineTo(...screen(box[i | bit])); pen.stroke();
      }
      pen.fillStyle = style.getPropertyValue('--ink'); pen.font = '14px system-ui, sans-serif';
      const ended = at < frame ? ', ended' : '';
      pen.fillText(`${sides[side]}: ${episode.return.toFixed(1)}${ended}`, side * part + 10, 20);
      pen.restore();
    });
    slider.value = frame;
  }

  function step(time) {
    if (!playing) return;
    if (time - last > 1000 * seconds) { last = time; frame = (frame + 1) % (Number(slider.max) + 1); draw(); }
    requestAnimationFrame(step);
  }
  function longest() { slider.max = Math.max(...tasks[task.value].episodes.map(x => x.frames.length)) - 1; }
  play.onclick = event => { event.preventDefault(); playing = !playing; play.textContent = playing ? 'Pause' : 'Play'; requestAnimationFrame(step); };
  slider.oninput = () => { frame = Number(slider.value); draw(); };
  task.onchange = () => { frame = 0; longest(); draw(); };
  canvas.onpointerdown = event => canvas.setPointerCapture(event.pointerId);
  canvas.onpointermove = event => {
    if (!event.buttons) return;
    turn -= event.movementX / 150; tilt = Math.min(1.5, Math.max(0, tilt + event.movementY / 150)); draw();
  };
  addEventListener('resize', draw);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  longest(); frame = Math.floor(slider.max / 3); draw();
}
