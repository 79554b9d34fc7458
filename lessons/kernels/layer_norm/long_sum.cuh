// The sum of many numbers by one thread.

#pragma once

#include "tasks.h"

namespace lessons {

// One running sum would round each number to the digits that the whole of those before it has left. So 64 at a time are
// added up, and then what they came to.
class LongSum {
 public:
  FASTGPT_PRIM void add(float x) {
    part_ += x;
    if (++count_ % 64 != 0) return;
    whole_ += part_;
    part_ = 0.0f;
  }
  FASTGPT_PRIM float total() const { return whole_ + part_; }

 private:
  float whole_ = 0.0f, part_ = 0.0f;
  int count_ = 0;
};

}  // namespace lessons
