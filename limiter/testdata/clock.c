// Preloaded into a redis-server: adds to its clock the microseconds that stand in the file $CLOCK_STEP, as they are at the time.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>

int gettimeofday(struct timeval *tv, void *tz) {
  static int (*real)(struct timeval *, void *);
  static volatile int64_t *step;
  if (!step) {
    real = dlsym(RTLD_NEXT, "gettimeofday");
    step = mmap(0, sizeof *step, PROT_READ, MAP_SHARED, open(getenv("CLOCK_STEP"), O_RDONLY), 0);
  }
  int failed = real(tv, tz);
  int64_t now = tv->tv_sec * INT64_C(1000000) + tv->tv_usec + *step;
  tv->tv_sec = now / 1000000;
  tv->tv_usec = now % 1000000;
  return failed;
}
