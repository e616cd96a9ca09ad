// What the tests expect: failures are printed and counted, and decide the exit status.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace expected {

inline int failures = 0;
// what is under test, for the messages
inline std::string where = "here";

inline void expect(bool good, const std::string& what) {
    if (good) return;
    std::printf("FAILED (%s): %s\n", where.c_str(), what.c_str());
    ++failures;
}

inline void near(double got, double want, double tolerance, const std::string& what) {
    const bool same = got == want || (std::isnan(got) && std::isnan(want));
    expect(same || std::fabs(got - want) <= tolerance,
           what + ": " + std::to_string(got) + " instead of " + std::to_string(want));
}

inline int status() {
    std::printf(failures ? "%d failures\n" : "all good\n", failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}

}  // namespace expected
