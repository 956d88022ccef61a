// Two ways to draw the points of the map: WebGL, and a 2D canvas where that is missing.
//
// Both take the same: positions (from, to: Float32Array of x, y; t from 0 to 1 between them), a style for each point
// (Uint8Array, 0 is not drawn) and the colour of each style ([red, green, blue, opacity], 0 to 255 and 0 to 1), and
// draw a view {x, y: centre; scale: CSS pixels a unit; width, height; ratio: device pixels a CSS pixel; size}.

import {
  createBufferInfoFromArrays, createProgramInfo, drawBufferInfo, setAttribInfoBufferFromArray, setBuffersAndAttributes,
  setUniforms,
} from "./twgl.js";

const VERTEX = `
attribute vec2 a_from, a_to;
attribute vec4 a_colour;
uniform vec2 u_centre, u_scale;
uniform float u_t, u_size;
varying vec4 v_colour;
varying float v_size;
void main() {
  v_colour = a_colour;
  gl_PointSize = v_size = u_size;
  vec2 place = (mix(a_from, a_to, u_t) - u_centre) * u_scale;
  gl_Position = a_colour.a == 0.0 ? vec4(2.0, 2.0, 2.0, 1.0) : vec4(place, 0.0, 1.0);
}`;
const FRAGMENT = `
precision mediump float;
varying vec4 v_colour;
varying float v_size;
void main() {
  float edge = (0.5 - length(gl_PointCoord - 0.5)) * v_size;
  float opacity = v_colour.a * clamp(edge + 0.5, 0.0, 1.0);
  gl_FragColor = vec4(v_colour.rgb * opacity, opacity);
}`;

export class WebGLPoints {
  /** A renderer, or null where there is no WebGL, or only one that the processor imitates: the canvas is quicker then. */
  static on(canvas, imitated) {
    const wanted = { antialias: false, failIfMajorPerformanceCaveat: !imitated };
    const gl = canvas.getContext("webgl2", wanted) || canvas.getContext("webgl", wanted);
    return gl && new WebGLPoints(gl);
  }

  constructor(gl) {
    this.name = "WebGL";
    this.gl = gl;
    this.program = createProgramInfo(gl, [VERTEX, FRAGMENT], (message) => { throw new Error(message); });
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  }

  setPositions(from, to) {
    if (!this.buffers) {
      this.buffers = createBufferInfoFromArrays(this.gl, {
        a_from: { numComponents: 2, data: from },
        a_to: { numComponents: 2, data: to },
        a_colour: { numComponents: 4, data: new Uint8Array(2 * from.length), normalize: true },
      });
      return;
    }
    setAttribInfoBufferFromArray(this.gl, this.buffers.attribs.a_from, from);
    setAttribInfoBufferFromArray(this.gl, this.buffers.attribs.a_to, to);
  }

  setStyles(styles, colours) {
    const bytes = new Uint8Array(4 * styles.length);
    const words = new Uint32Array(bytes.buffer);
    const palette = new Uint32Array(colours.map(([r, g, b, a]) =>
      new Uint32Array(Uint8Array.of(r, g, b, Math.round(255 * a)).buffer)[0]));
    for (let i = 0; i < styles.length; i++) words[i] = styles[i] === 0 ? 0 : palette[styles[i]];
    setAttribInfoBufferFromArray(this.gl, this.buffers.attribs.a_colour, bytes);
  }

  draw(view, t) {
    const { gl } = this;
    gl.viewport(0, 0, gl.canvas.width, gl.canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.useProgram(this.program.program);
    setBuffersAndAttributes(gl, this.program, this.buffers);
    setUniforms(this.program, {
      u_centre: [view.x, view.y],
      u_scale: [(2 * view.scale) / view.width, (2 * view.scale) / view.height],
      u_size: view.size * view.ratio,
      u_t: t,
    });
    drawBufferInfo(gl, this.buffers, gl.POINTS);
  }
}

export class CanvasPoints {
  constructor(canvas) {
    this.name = "canvas";
    // The picture is put together here and copied: without a graphics card that is much quicker than to draw discs.
    this.context = canvas.getContext("2d", { willReadFrequently: true });
  }

  setPositions(from, to) {
    this.from = from;
    this.to = to;
  }

  setStyles(styles, colours) {
    this.styles = styles;
    this.faint = colours.map(([, , , a]) => a < 0.5);
    this.words = new Uint32Array(colours.map(([r, g, b, a]) =>
      new Uint32Array(Uint8Array.of(r, g, b, Math.round(255 * a)).buffer)[0]));
  }

  draw(view, t) {
    const { context, from, to, styles, words, faint } = this;
    const { width, height } = context.canvas;
    if (this.image?.width !== width || this.image.height !== height) {
      this.image = context.createImageData(width, height);
      this.pixels = new Uint32Array(this.image.data.buffer);
    }
    const { pixels } = this;
    pixels.fill(0);
    const radius = (view.size * view.ratio) / 2, reach = Math.ceil(radius), scale = view.scale * view.ratio;
    const half = Array.from({ length: 2 * reach + 1 }, (_, i) => Math.round(Math.sqrt(Math.max(0, radius ** 2 - (i - reach) ** 2))));
    for (const first of [true, false]) { // faint points lie below the others
      for (let i = 0; i < styles.length; i++) {
        const style = styles[i];
        if (style === 0 || faint[style] !== first) continue;
        const x = Math.round((from[2 * i] + t * (to[2 * i] - from[2 * i]) - view.x) * scale + width / 2);
        const y = Math.round(height / 2 - (from[2 * i + 1] + t * (to[2 * i + 1] - from[2 * i + 1]) - view.y) * scale);
        if (x < -reach || y < -reach || x >= width + reach || y >= height + reach) continue;
        const end = Math.min(height - 1, y + reach);
        for (let row = Math.max(0, y - reach); row <= end; row++) {
          const h = half[row - y + reach];
          if (h > 0) pixels.fill(words[style], row * width + Math.max(0, x - h), row * width + Math.min(width, x + h));
        }
      }
    }
    context.putImageData(this.image, 0, 0);
  }
}
