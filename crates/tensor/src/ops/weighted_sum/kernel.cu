// One thread: the numbers stay on the GPU, so that nothing waits for them.

extern "C" __global__ void add_term(float *out, const float *term, float weight) { *out += weight * *term; }

extern "C" __global__ void scale(float *out, const float *x, float weight) { *out = weight * *x; }
