// Numbers of a measurement as a table, a plot, rows of coreml/results.csv and JSON.

export const DRIFT = 1.15; // of the last fifth of the rounds over the first, from which a row is remarked on
const LEAST_RUNS = 10; // of a row of the file, as phone_results.py wants
const SHAPES = {
  wasm: 'M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0', threads: 'M-5-5h10v10h-10z', webgpu: 'M0-6l6 10h-12z',
  'litert-wasm': 'M0-7l6 7l-6 7l-6-7z', 'litert-threads': 'M-7-2h5v-5h4v5h5v4h-5v5h-4v-5h-5z',
};
export const BACKENDS = Object.keys(SHAPES);

/** A quantile with linear interpolation, as in NumPy. */
export function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  const place = share * (sorted.length - 1);
  const low = Math.floor(place);
  return sorted[low] + (place - low) * (sorted[Math.ceil(place)] - sorted[low]);
}

/** Median, percentiles and drift of a row from its rounds, arrays of milliseconds. */
export function summarise(rounds) {
  const times = rounds.flat();
  const fifth = Math.max(1, Math.round(rounds.length / 5));
  return {
    runs: times.length, median: quantile(times, 0.5), p10: quantile(times, 0.1), p90: quantile(times, 0.9),
    drift: quantile(rounds.slice(-fifth).flat(), 0.5) / quantile(rounds.slice(0, fifth).flat(), 0.5),
  };
}

export function formatMs(value) {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

function formatError(value) {
  return Number.isFinite(value) ? value.toExponential(1) : 'not finite';
}

/** Cells of a row of the table: {text, kind} in the order of the columns. */
export function describeRow(row) {
  const cells = [{ text: row.program.label }, { text: row.backend.label }];
  const summary = row.summary;
  if (summary) {
    cells.push(
      { text: formatMs(summary.median), kind: 'number' },
      { text: `${formatMs(summary.p10)}–${formatMs(summary.p90)}`, kind: 'number' },
      { text: formatMs(row.warm.first_ms), kind: 'number' },
      { text: formatMs(row.loaded.load_ms), kind: 'number' });
  } else {
    cells.push(...Array(4).fill({ text: '' }));
  }
  cells.push({ text: row.check ? formatError(row.check.error) : '', kind: 'number' });
  const remarks = summary ? listRemarks(row) : [row.failure];
  cells.push({ text: remarks.join('; '), kind: row.isWrong ? 'bad' : 'warn' });
  return cells;
}

export function listRemarks({ summary, warm, loaded, protocol }) {
  const remarks = [];
  if (summary.runs < LEAST_RUNS) remarks.push(`fewer than ${LEAST_RUNS} runs: no row to send`);
  if (summary.drift > DRIFT) remarks.push(`slowed down ${summary.drift.toFixed(2)} times: hot or busy`);
  if (!warm.isStable) remarks.push('times not stable after the warm-up');
  if (warm.block > 1) remarks.push(`coarse clock: ${warm.block} runs timed together`);
  if (!loaded.isHashed) remarks.push('hash not checked: not a secure context');
  if (protocol) remarks.push(protocol);
  return remarks;
}

/** A row of coreml/results.csv, by column name. */
function makeCells(row, manifest, sender) {
  const { program, backend, summary, warm, loaded, check } = row;
  const isGPU = backend.name === 'webgpu';
  const { format, form, sha256 } = program.files[backend.runtime];
  const remarks = listRemarks(row);
  return {
    date: row.date, reporter: sender.reporter, device: sender.device, os: sender.os, model: program.model,
    form, size: program.size.join('x'), batch: 1, format, precision: program.precision,
    compress: 'none', input: 'tensor', target: '', version: manifest.version, tool: 'browser',
    tool_version: sender.browser,
    runtime: `${manifest.runtimes[backend.runtime].name} ${backend.provider}`,
    compute_units: isGPU ? 'gpu_only' : 'cpu_only',
    threads: isGPU ? '' : backend.threads, statistic: 'median', runs: summary.runs, warm_up: warm.warm_up,
    latency_ms: summary.median.toFixed(3), p10_ms: summary.p10.toFixed(3), p90_ms: summary.p90.toFixed(3),
    first_ms: warm.first_ms.toFixed(3), load_ms: loaded.load_ms.toFixed(1), drift: summary.drift.toFixed(3),
    error: check.error === 0 ? '0' : check.error.toExponential(1), program: sha256.slice(0, 12),
    note: [sender.note, ...remarks].filter(Boolean).join('; '),
  };
}

function quote(value) {
  const text = String(value).replace(/[\r\n]+/g, ' ');
  return /[",]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** The rows that have a time, as lines of the file, without its header. */
export function makeCSV(rows, manifest, sender) {
  return rows.filter(({ summary }) => summary?.runs >= LEAST_RUNS).map((row) => {
    const cells = makeCells(row, manifest, sender);
    return manifest.columns.map((name) => quote(cells[name] ?? '')).join(',');
  });
}

/** Everything, with every time, for people who want to look closer. */
export function makeJSON(rows, manifest, sender, facts) {
  const plain = rows.map((row) => ({
    model: row.program.model, precision: row.program.precision, weights: row.program.weights || 'random',
    sha256: row.program.files[row.backend.runtime]?.sha256 ?? null, backend: row.backend.name,
    runtime: manifest.runtimes[row.backend.runtime].name, threads: row.backend.threads ?? null, date: row.date,
    protocol: row.rules, remarks: row.summary ? listRemarks(row) : [], failure: row.failure ?? null,
    warm_up: row.warm ?? null, loaded: row.loaded ?? null, check: row.check ?? null,
    rounds_ms: row.failure ? null : row.rounds,
  }));
  return JSON.stringify({ sender, facts, rows: plain }, null, 1);
}

function svg(name, attributes, text = '') {
  const element = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

/** Published accuracy against the measured median; an empty list where no accuracy is published. */
export function drawPlot(rows, width) {
  const points = rows.filter((row) => row.summary && row.program.top1)
    .map((row) => ({ row, x: Math.log10(row.summary.median), y: row.program.top1 }));
  if (!points.length) return [];
  const [height, left, bottom] = [Math.min(360, 0.8 * width), 34, 44];
  const span = (values, low, high = low) => [Math.min(...values) - low, Math.max(...values) + high];
  const [x0, x1] = span(points.map(({ x }) => x), 0.08, 0.12);
  const [y0, y1] = span(points.map(({ y }) => y), 1.5);
  const toX = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - 12);
  const toY = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - bottom - 14);
  const picture = svg(
    'svg', { viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': 'Accuracy against latency' });
  for (let power = -1; power < 5; power++) {
    for (const digit of x1 - x0 < 1 ? [1, 1.5, 2, 3, 5, 7] : [1, 2, 5]) {
      const tick = digit * 10 ** power;
      const x = Math.log10(tick);
      if (x < x0 || x > x1) continue;
      picture.append(
        svg('path', { d: `M${toX(x)} 10V${height - bottom}`, class: 'line' }),
        svg('text', { x: toX(x), y: height - bottom + 16, 'text-anchor': 'middle', class: 'soft' }, tick));
    }
  }
  for (let y = Math.ceil(y0); y <= y1; y += y1 - y0 > 8 ? 2 : 1) {
    picture.append(
      svg('path', { d: `M${left} ${toY(y)}H${width - 12}`, class: 'line' }),
      svg('text', { x: left - 6, y: toY(y) + 4, 'text-anchor': 'end', class: 'soft' }, y));
  }
  picture.append(svg(
    'text', { x: (left + width) / 2, y: height - 8, 'text-anchor': 'middle', class: 'soft' },
    'Median latency in this browser, ms'));
  const taken = points.map(({ x, y }) => [toX(x) - 6, toY(y) + 4, 12]); // left, baseline and length of texts and marks
  for (const { row, x, y } of points) {
    const { model, precision } = row.program;
    const text = precision === 'fp32' ? model : `${model} ${precision}`;
    const [atX, atY, length] = [toX(x), toY(y), 6.6 * text.length];
    const places = [4, -8, 17, -20, 30].flatMap((dy) => [[9, dy], [-9 - length, dy]])
      .filter(([dx]) => atX + dx > left && atX + dx + length < width);
    const [dx, dy] = places.find(([dx, dy]) => !taken.some(([otherX, otherY, otherLength]) => (
      Math.abs(atY + dy - otherY) < 12 && atX + dx < otherX + otherLength && otherX < atX + dx + length))) ?? [9, 4];
    taken.push([atX + dx, atY + dy, length]);
    picture.append(
      svg('path', { d: SHAPES[row.backend.name], transform: `translate(${atX} ${atY})`, class: 'mark' }),
      svg('text', { x: atX + dx, y: atY + dy }, text));
  }
  const isLiteRT = points.some(({ row }) => row.backend.runtime === 'litert');
  const caption = document.createElement('figcaption');
  const notes = new Set(points.filter(({ row }) => row.program.top1_note)
    .map(({ row }) => `${row.program.model}: ${row.program.top1_note}`));
  caption.textContent = [
    'Top-1 accuracy on ImageNet-1K in %, as published by the authors, against the time measured here. Circle: one ' +
    `CPU thread, square: several, triangle: WebGPU${isLiteRT ? '; LiteRT.js, diamond: one, cross: several' : ''}`,
    ...notes].join('. ') + '.';
  return [picture, caption];
}
