// A worker for each program, and what its check means.

/** A worker with one program. */
export class Job {
  constructor() {
    this.worker = new Worker(new URL('start_worker.js', import.meta.url));
    this.pending = new Map();
    this.worker.onmessage = ({ data: { id, result, error, progress } }) => {
      const { resolve, reject, report } = this.pending.get(id);
      if (progress !== undefined) report(progress);
      else if (error === undefined) resolve(result);
      else reject(new Error(error));
    };
    this.worker.onerror = (event) => {
      const error = new Error(event.message || 'The worker could not be started.');
      for (const { reject } of this.pending.values()) reject(error);
    };
  }

  /** Let the worker act; `report` gets its progress. */
  call(action, options = {}, report = () => {}) {
    if (this.ended) return Promise.reject(new Error(this.ended));
    const id = this.pending.size;
    return new Promise((resolve, reject) => {
      this.pending.set(id, { resolve, reject, report });
      this.worker.postMessage({ id, action, options });
    });
  }

  /** End the worker at once; what it was doing fails with this reason. */
  end(reason = 'stopped') {
    this.ended ??= reason;
    this.worker.terminate();
    for (const { reject } of this.pending.values()) reject(new Error(reason));
  }

  /** Load a program and check it: {loaded, check}; a worker that cannot do so is ended. */
  async open(manifest, program, backend, report) {
    try {
      const loaded = await this.call('load', { manifest, wanted: program, backend }, report);
      return { loaded, check: await this.call('check') };
    } catch (error) {
      this.end();
      throw error;
    }
  }
}

export function describeError({ error }) {
  return Number.isFinite(error) ? `${error.toExponential(1)} of the largest logit` : 'outputs that are not numbers';
}

export function explainWrong(program, check) {
  const pixels = check.samePixels ? '' : ' Its images are prepared differently here: an extension or a privacy ' +
    'setting may change what pages read from images.';
  return `${program.label} computes something else here: error ${describeError(check)}, ` +
    `${program.tolerance} is allowed.${pixels}`;
}
