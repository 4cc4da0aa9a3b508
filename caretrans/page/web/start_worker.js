// Starts worker.js in a classic worker, as LiteRT.js needs one: it calls importScripts, which modules do not have.
const worker = import('./worker.js');
self.onmessage = async ({ data }) => {
  try {
    (await worker).answer(data);
  } catch (error) { // of the import: `answer` reports its own
    self.postMessage({ id: data.id, error: error.message });
  }
};
