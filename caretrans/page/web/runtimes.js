// The runtimes: each loads a program and gives {run}, from an image as numbers to its logits on the CPU.

async function checkWebGPU(precision) {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) throw new Error('This browser offers no WebGPU here.');
  if (precision === 'fp16' && !adapter.features.has('shader-f16')) {
    throw new Error('This GPU does not compute in float16 (shader-f16): choose the fp32 file.');
  }
}

/** ONNX Runtime Web, on the CPU or by WebGPU. */
async function prepareONNX(folder, program, { provider, threads = 1 }) {
  const isGPU = provider === 'webgpu';
  if (isGPU) await checkWebGPU(program.precision);
  const script = isGPU ? ('Suspending' in WebAssembly ? 'ort.jspi.min.mjs' : 'ort.webgpu.min.mjs') : 'ort.wasm.min.mjs';
  const ort = await import(folder + script);
  ort.env.wasm.wasmPaths = folder;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = 'error';
  return async (content) => {
    const [height, width] = program.size;
    const session = await ort.InferenceSession.create(content, {
      executionProviders: [provider], freeDimensionOverrides: { batch: 1, height, width },
    });
    return async (image) => {
      const input = new ort.Tensor('float32', image, [1, 3, height, width]);
      const output = (await session.run({ [session.inputNames[0]]: input }))[session.outputNames[0]];
      const logits = Float32Array.from(await output.getData());
      output.dispose();
      return logits;
    };
  };
}

/** LiteRT.js on the CPU. Its scripts look for their files beside the worker unless told otherwise. */
async function prepareLiteRT(folder, program, { threads = 1 }) {
  const litert = await import(`${folder}index.js`);
  self.Module = {
    locateFile: (name) => folder + name, mainScriptUrlOrBlob: `${folder}litert_wasm_threaded_internal.js`,
  };
  return async (content) => {
    await litert.loadLiteRt(folder, { threads: threads > 1 });
    const model = await litert.loadAndCompile(content, { accelerator: 'wasm', cpuOptions: { numThreads: threads } });
    return async (image) => {
      const input = new litert.Tensor(image, [1, 3, ...program.size]);
      const [output] = await model.run([input]);
      const logits = Float32Array.from(output.toTypedArray());
      input.delete();
      output.delete();
      return logits;
    };
  };
}

const PREPARE = { onnxruntime: prepareONNX, litert: prepareLiteRT };

/** Load a runtime's scripts: a function that makes a program, from the bytes of its file, ready to run. */
export function prepareRuntime(manifest, program, backend) {
  const folder = new URL(manifest.runtimes[backend.runtime].folder, self.location.href).href;
  return PREPARE[backend.runtime](folder, program, backend);
}
