// Images as the networks take them: the steps of Pillow, torchvision and timm, to the same bits.
// A canvas resizes differently, by up to 17 of 255, so the 8-bit resampling of Pillow is written out here.

const BITS = 22; // of the fraction of Pillow's fixed-point weights
const MAX_ASPECT = 100; // beyond, only the middle of an image is used

const FILTERS = {
  bilinear: { support: 1, weigh: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    weigh: (x) => {
      const a = -0.5;
      x = Math.abs(x);
      if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
    },
  },
};

/** Decode a file to {width, height, data} with 3 bytes per pixel, rotated upright as its EXIF data say. */
export async function decode(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: 'none', imageOrientation: 'from-image' });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height, { colorSpace: 'srgb' }).data;
  const data = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; to < data.length; from += 4, to += 3) {
    data[to] = rgba[from];
    data[to + 1] = rgba[from + 1];
    data[to + 2] = rgba[from + 2];
  }
  return { width, height, data };
}

/** First source pixel and fixed-point weights of each pixel of a resized row or column. */
function computeWeights(from, to, { support, weigh }) {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  return Array.from({ length: to }, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const last = Math.min(from, Math.trunc(center + reach + 0.5));
    const exact = Array.from({ length: last - first }, (_, i) => weigh((i + first - center + 0.5) * (1 / stretch)));
    const sum = exact.reduce((total, value) => total + value, 0);
    const fixed = exact.map((value) => {
      const share = sum === 0 ? value : value / sum;
      return Math.trunc(share * 2 ** BITS + (share < 0 ? -0.5 : 0.5));
    });
    return { first, weights: Int32Array.from(fixed) };
  });
}

function clip(value) {
  return Math.min(255, Math.max(0, value >> BITS));
}

function resizeRows({ width, height, data }, to, filter) {
  const result = new Uint8Array(3 * to * height);
  const columns = computeWeights(width, to, filter);
  for (let y = 0, out = 0; y < height; y++) {
    for (const { first, weights } of columns) {
      let at = 3 * (y * width + first);
      let [red, green, blue] = [1 << (BITS - 1), 1 << (BITS - 1), 1 << (BITS - 1)];
      for (let i = 0; i < weights.length; i++, at += 3) {
        red += data[at] * weights[i];
        green += data[at + 1] * weights[i];
        blue += data[at + 2] * weights[i];
      }
      result[out++] = clip(red);
      result[out++] = clip(green);
      result[out++] = clip(blue);
    }
  }
  return { width: to, height, data: result };
}

function resizeColumns({ width, height, data }, to, filter) {
  const row = 3 * width;
  const result = new Uint8Array(row * to);
  computeWeights(height, to, filter).forEach(({ first, weights }, y) => {
    for (let x = 0; x < row; x++) {
      let sum = 1 << (BITS - 1);
      for (let i = 0, at = first * row + x; i < weights.length; i++, at += row) sum += data[at] * weights[i];
      result[y * row + x] = clip(sum);
    }
  });
  return { width, height: to, data: result };
}

/**
 * Pillow's resize with antialiasing: first the rows, then the columns, 8 bits in between. Since 2026 Pillow takes the
 * columns first where an image is more than 100 times as tall as wide; such images, squashed, differ slightly.
 */
export function resize(image, width, height, interpolation) {
  const filter = FILTERS[interpolation];
  if (image.width !== width) image = resizeRows(image, width, filter);
  return image.height === height ? image : resizeColumns(image, height, filter);
}

/** Python's round: halves to the even neighbour. */
function round(value) {
  const floor = Math.floor(value);
  if (value - floor !== 0.5) return Math.round(value);
  return floor % 2 ? floor + 1 : floor;
}

/** torchvision's centre crop of an image that is at least as large. */
function cropCenter(image, width, height) {
  const left = round((image.width - width) / 2);
  const top = round((image.height - height) / 2);
  const data = new Uint8Array(3 * width * height);
  for (let y = 0; y < height; y++) {
    const start = 3 * ((top + y) * image.width + left);
    data.set(image.data.subarray(start, start + 3 * width), 3 * width * y);
  }
  return { width, height, data };
}

/** Resize and crop a decoded image as in evaluation; {width, height, data} of the size of the network. */
export function prepare(image, { input_size: [, height, width], crop_pct: share, crop_mode: mode, interpolation }) {
  const scaled = [Math.floor(width / share), Math.floor(height / share)];
  if (mode === 'center') {
    const longest = MAX_ASPECT * Math.min(image.width, image.height);
    if (Math.max(image.width, image.height) > longest) {
      image = cropCenter(image, Math.min(image.width, longest), Math.min(image.height, longest));
    }
    const [short, long] = [image.width, image.height].sort((a, b) => a - b);
    const other = Math.trunc((scaled[0] * long) / short);
    scaled[image.width <= image.height ? 1 : 0] = other;
  }
  return cropCenter(resize(image, ...scaled, interpolation), width, height);
}

/** Pixels as a float32 tensor (3, H, W), normalised with the roundings of torchvision. */
export function normalise({ width, height, data }, { mean, std }) {
  const tensor = new Float32Array(3 * width * height);
  for (let channel = 0; channel < 3; channel++) {
    const [center, spread] = [Math.fround(mean[channel]), Math.fround(std[channel])];
    const values = Float32Array.from(
      { length: 256 }, (_, value) => Math.fround(Math.fround(value / 255) - center) / spread);
    for (let at = channel, to = channel * width * height; at < data.length; at += 3) tensor[to++] = values[data[at]];
  }
  return tensor;
}
