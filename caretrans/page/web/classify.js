// Classifying: a photo of a file or of the camera, and its likeliest classes.
import { describeProgress, find, setState } from './dom.js';
import { explainWrong, Job } from './job.js';
import { formatMs } from './results.js';

let manifest;
let backend; // that classifies
let classifier; // {program, job} of the last photo
let classifying = Promise.resolve(); // until the last photo is done
let photo; // the last one, or the promise of it

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - largest));
  const sum = powers.reduce((total, value) => total + value, 0);
  return powers.map((value) => value / sum);
}

function showPixels({ width, height, data }) {
  const canvas = find('seen');
  Object.assign(canvas, { width, height });
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) image.data.set([data[3 * i], data[3 * i + 1], data[3 * i + 2], 255], 4 * i);
  canvas.getContext('2d').putImageData(image, 0, 0);
}

function showClasses(logits, names) {
  const shares = softmax(logits);
  const best = [...shares.keys()].sort((a, b) => shares[b] - shares[a]).slice(0, 5);
  find('classes').replaceChildren(...best.map((label) => {
    const item = document.createElement('li');
    const bar = document.createElement('meter');
    bar.value = shares[label];
    bar.setAttribute('aria-hidden', 'true');
    const name = document.createElement('span');
    const share = document.createElement('span');
    name.textContent = names[label];
    share.textContent = `${(100 * shares[label]).toFixed(1)} %`;
    item.append(name, share, bar);
    return item;
  }));
}

async function openClassifier(program) {
  if (classifier?.program === program) return classifier.job;
  endClassifier();
  const job = new Job();
  classifier = { program, job };
  try {
    const { check } = await job.open(manifest, program, backend, (progress) => {
      setState(find('classify-state'), `Loading ${program.model}: ${describeProgress(progress)}`);
    });
    if (!check.isRight || !check.samePixels) throw new Error(explainWrong(program, check));
    return job;
  } catch (error) {
    endClassifier();
    throw error;
  }
}

/** Free its memory; what it was doing fails. */
export function endClassifier() {
  classifier?.job.end();
  classifier = undefined;
}

/** Free the processor, the memory and the camera, once the last photo is done. */
export async function endClassifying() {
  stopCamera();
  await classifying;
  endClassifier();
}

/** Classify one photo, or the promise of one, after the other. */
function classify(blob) {
  photo = blob;
  classifying = classifying.then(() => classifyNow(blob));
  return classifying;
}

async function classifyNow(blob) {
  const state = find('classify-state');
  const program = manifest.programs[find('classify-model').value];
  try {
    const job = await openClassifier(program);
    setState(state, 'Classifying…');
    const result = await job.call('classify', { blob: await blob });
    showPixels(result.pixels);
    showClasses(result.logits, manifest.class_lists[program.classes]);
    find('prediction').hidden = false;
    find('prediction').dataset.digest = result.digest ?? '';
    setState(state, `Prepared in ${formatMs(result.prepare_ms)} ms, classified in ${formatMs(result.run_ms)} ms, ` +
      'once and without warm-up. The picture is what the network sees, rotated upright as its EXIF data say.');
  } catch (error) {
    find('prediction').hidden = true;
    const unread = error.name === 'InvalidStateError' || /decode/.test(error.message);
    setState(state, unread ? 'This file cannot be read as an image here: choose a JPEG or PNG.' : error.message, 'bad');
  }
}

async function startCamera() {
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } });
    find('video').srcObject = stream;
    await find('video').play();
    find('camera-view').hidden = false;
  } catch (error) {
    setState(find('classify-state'), `The camera cannot be used (${error.message}): choose a photo instead.`, 'bad');
  }
}

function stopCamera() {
  for (const track of find('video').srcObject?.getTracks() ?? []) track.stop();
  find('video').srcObject = null;
  find('camera-view').hidden = true;
}

async function takePhoto() {
  const video = find('video');
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext('2d').drawImage(video, 0, 0);
  stopCamera();
  await classify(await canvas.convertToBlob({ type: 'image/png' }));
}

export function prepareClassify(wholeManifest, firstBackend) {
  [manifest, backend] = [wholeManifest, firstBackend];
  const able = [...manifest.programs.entries()].filter(([, program]) => program.weights);
  find('classify-none').hidden = able.length > 0;
  find('classify-tools').hidden = able.length === 0;
  find('classify-model').replaceChildren(...able.map(([i, program]) => new Option(
    program.label.includes(program.weights) ? program.label : `${program.label}, ${program.weights}`, i)));
  find('camera').hidden = !navigator.mediaDevices?.getUserMedia;
  find('classify-model').onchange = () => photo && classify(photo);
  find('photo').onchange = ({ target }) => {
    if (target.files[0]) classify(target.files[0]);
    target.value = ''; // or choosing the same file again would be no change
  };
  const classifySample = () => classify(fetch(manifest.images[0]).then((response) => response.blob()));
  find('sample').onclick = classifySample;
  find('camera').onclick = startCamera;
  find('camera-stop').onclick = stopCamera;
  find('shoot').onclick = takePhoto;
  if (able.length) classifySample();
}
