// Shared by the parts of the page: elements, their states, and sizes in words.

export const find = (id) => document.getElementById(id);
export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
export const getBytes = (program) => program.files.onnxruntime.bytes;
export const describeProgress = ({ count, total }) => `${Math.round((100 * count) / total)} % of ${megabytes(total)}`;

export function setState(element, text, kind = '') {
  element.textContent = text;
  element.classList.toggle('good', kind === 'good');
  element.classList.toggle('bad', kind === 'bad');
}
